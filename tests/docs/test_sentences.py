"""Sentences of the pages that are kept plain: at most 30 words, and half of them at most 16."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, relative
from tests.docs.markdown import pages, prose_of

LONGEST, MEDIAN, WORDS = 30, 16, 800
_DOCS = ROOT / "docs"
PLAIN = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *(page for page in pages() if page.parent in {_DOCS, _DOCS / "reference"}),
    *(page for page in pages() if page.parent == _DOCS / "results" and page.name != "gso.md"),
    _DOCS / "decisions/0037-the-step-is-a-share-of-the-row.md",
]
GUIDES = [page for page in pages() if page.parent == _DOCS and page.name not in {"README.md", "method.md"}]


def sentences_of(page: Path) -> list[str]:
    """The sentences of a page's paragraphs and list items; tables, headings, comments and pictures are no sentences."""
    prose = re.sub(r"<!--.*?-->|<picture>.*?</picture>", "", prose_of(page), flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if not re.match(r"\s*(?:\||#)", line)]
    text = re.sub(r"^\s*(?:[-*]|\d+\.) +", "\n\n", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", text)  # a name or a line of code is read as one word
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\*\*|(?<!\w)\*|\*(?!\w)", "", text)
    parts = [part for block in re.split(r"\n\s*\n", text) for part in re.split(r"(?<=[.!?])\s+(?=\S)", block.strip())]
    return [" ".join(part.split()) for part in parts if re.search(r"\w", part)]


def words_of(sentence: str) -> int:
    """The words of a sentence; signs and formulas between spaces do not count."""
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def _check(page: Path) -> None:
    sentences = sentences_of(page)
    long = [f"{words_of(s)}: {s}" for s in sentences if words_of(s) > LONGEST]
    assert not long, f"{relative(page)}: sentences of more than {LONGEST} words:\n" + "\n".join(long)
    median = statistics.median(words_of(s) for s in sentences) if sentences else 0
    assert median <= MEDIAN, f"{relative(page)}: half of the sentences have more than {median} words"


@pytest.mark.parametrize("page", PLAIN, ids=relative)
def test_sentences_are_short(page):
    _check(page)


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_a_guide_is_one_page(page):
    words = prose_of(page).split()
    assert len(words) <= WORDS, f"{relative(page)} has {len(words)} words; what is reference goes to docs/reference"


def test_the_readme_is_at_most_900_words():
    words = (ROOT / "README.md").read_text(encoding="utf8").split()
    assert len(words) <= 900, f"README.md has {len(words)} words"


def test_a_long_sentence_is_caught(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n- " + "word " * 31 + "end.\n- Short, with `code of many words` in it.\n", encoding="utf8"
    )
    assert [words_of(s) for s in sentences_of(page)] == [32, 5]


def test_a_sentence_ends_at_its_stop(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("One two. Three [four](five) at 1.5 %.\n\n| a | b |\n", encoding="utf8")
    assert sentences_of(page) == ["One two.", "Three four at 1.5 %."]
