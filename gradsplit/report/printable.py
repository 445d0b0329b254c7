"""Text from a file on its way to a terminal, which obeys some characters instead of showing them."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    r"""Return the text with everything a terminal would obey (colours, titles, the cursor) or hide shown as �.

    Line feeds stay.

    >>> printable("a\x1b[2Jb\nc")
    'a�[2Jb\nc'
    """
    return "".join(character if character == "\n" or character.isprintable() else "�" for character in text)
