"""What the makers of pages share: tables of Markdown with their evidence, medians with a range, places in a page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["filled", "table", "with_range"]


def table(head: Iterable[object], rows: Iterable[Iterable[object]], evidence: str = "") -> str:
    """A table, after the mark that names its raw file where one is given.

    >>> print(table(["method", "loss"], [["GSO", 1.25]], "benchmarks/results/x.json"), end="")
    <!-- evidence: benchmarks/results/x.json -->
    <BLANKLINE>
    | method | loss |
    |---|---|
    | GSO | 1.25 |
    """
    head = list(head)
    mark = [f"<!-- evidence: {evidence} -->", ""] if evidence else []
    return "\n".join([*mark, _line(head), "|" + "---|" * len(head), *map(_line, rows)]) + "\n"


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def with_range(scores: Sequence[float], digits: int = 3) -> str:
    """The median, and the range of several; without scores the words for that.

    >>> with_range([1.25, 1.0, 2.0]), with_range([1.0]), with_range([])
    ('1.250 (1.000 to 2.000)', '1.000', 'not run')
    """
    if not scores:
        return "not run"
    text = f"{statistics.median(scores):.{digits}f}"
    return text + (f" ({min(scores):.{digits}f} to {max(scores):.{digits}f})" if len(scores) > 1 else "")


def filled(page: str, parts: Mapping[str, str]) -> str:
    r"""A page with each part between its marks; what stood there goes, and an empty part says that it has not run.

    A part that has no marks in the page is left out: two pages may share a set of parts.

    >>> print(filled("<!-- table: a -->\nold\n<!-- end: a -->", {"a": "new\n", "b": "elsewhere"}))
    <!-- table: a -->
    <BLANKLINE>
    new
    <BLANKLINE>
    <!-- end: a -->
    """
    for name, part in parts.items():
        start, stop = re.escape(f"<!-- table: {name} -->"), rf"<!-- end(?:: {re.escape(name)})? -->"
        body = part.strip("\n") or "Not run yet."
        page = re.sub(
            rf"({start}\n).*?({stop})",
            lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
    return page
