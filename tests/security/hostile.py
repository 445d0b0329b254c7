"""Names as an attacker would write them, and what of them may be in a page."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["HOSTILE", "Elements", "elements_of"]

HOSTILE = (
    "<script>window.owned=1</script>",
    "</script><script>window.owned=2</script>",
    "<img src=x onerror=window.owned=3>",
    '"><svg onload=window.owned=4>',
    "' onmouseover='window.owned=5",
    '" onfocus="window.owned=6" autofocus="',
    "<a href='javascript:window.owned=7'>w</a>",
    "javascript:window.owned=8",
    "\u2028window.owned=9\u2029",
    "${window.owned=10}",
    "<!--<script>window.owned=11",
    "]]><script>window.owned=12</script>",
    "&lt;script&gt;window.owned=13&lt;/script&gt;",
    "</title></style></textarea><script>window.owned=14</script>",
    "<iframe srcdoc='<script>parent.owned=15</script>'>",
    "<a href='https://example.invalid/'>link</a>",
)


class Elements(HTMLParser):
    """All elements of a page with their attributes, as a browser would find them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))


def elements_of(page: str) -> list[tuple[str, dict[str, str]]]:
    """(tag, attributes) of every element."""
    parser = Elements()
    parser.feed(page)
    return parser.found
