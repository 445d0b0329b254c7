"""The parts of a Markdown file that a test can hold against the code: headings, fenced blocks, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.architecture.sources import tracked


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line it starts on."""

    language: str
    text: str
    line: int


class Heading(NamedTuple):
    """A heading: its depth and its text."""

    depth: int
    text: str


def pages() -> list[Path]:
    """Every Markdown file of the repository."""
    return tracked(".md")


def _fences(text: str) -> tuple[list[Block], str]:
    """The fenced blocks, and the text with those lines blanked (so that line numbers stay)."""
    blocks, prose, opened = [], [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*```(\S*)", line)
        if opened is None and fence:
            opened = (fence[1], number, [])
        elif opened is not None and fence:
            blocks.append(Block(opened[0], "\n".join(opened[2]) + "\n", opened[1]))
            opened = None
        elif opened is not None:
            opened[2].append(line)
            prose.append("")
            continue
        prose.append("" if fence else line)
    assert opened is None, f"the fence opened on line {opened[1]} is never closed"
    return blocks, "\n".join(prose)


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return _fences(path.read_text(encoding="utf8"))[0]


def prose_of(path: Path) -> str:
    """The page without its fenced blocks; line numbers are those of the file."""
    return _fences(path.read_text(encoding="utf8"))[1]


def headings_of(path: Path) -> list[Heading]:
    """The headings of a page, in order."""
    found = re.finditer(r"^(#{1,6}) +(.+?) *$", prose_of(path), re.MULTILINE)
    return [Heading(len(match[1]), match[2]) for match in found]


def links_of(path: Path) -> list[str]:
    """The targets of the inline links and pictures of a page."""
    prose = re.sub(r"`[^`\n]*`", "", prose_of(path))
    return re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)


def anchor_of(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower())
    return kept.replace(" ", "-")
