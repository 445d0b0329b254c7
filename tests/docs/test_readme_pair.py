"""README.md and README.zh-CN.md say the same: the same headings, commands, code, tables and links."""

from __future__ import annotations

import re

import pytest

from tests.architecture.sources import ROOT
from tests.docs.markdown import blocks_of, headings_of, links_of, prose_of

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def _without_comments(code: str) -> list[str]:
    """The lines a machine reads: comments are prose, and prose is translated."""
    lines = (re.sub(r"(^|\s+)#(?!!).*$", "", line).rstrip() for line in code.splitlines())
    return [line for line in lines if line]


def _table_rows(path) -> list[int]:
    """The number of cells of every table row, in order."""
    return [line.count("|") for line in prose_of(path).splitlines() if line.startswith("|")]


def test_the_headings_have_one_structure():
    english, chinese = headings_of(ENGLISH), headings_of(CHINESE)
    assert [h.depth for h in english] == [h.depth for h in chinese], (
        f"{len(english)} headings in README.md, {len(chinese)} in README.zh-CN.md: "
        f"{[h.text for h in english]} / {[h.text for h in chinese]}"
    )


def test_the_fenced_blocks_are_the_same_but_for_comments():
    english = [(block.language, _without_comments(block.text)) for block in blocks_of(ENGLISH)]
    chinese = [(block.language, _without_comments(block.text)) for block in blocks_of(CHINESE)]
    assert english == chinese


def test_the_tables_have_the_same_rows():
    assert _table_rows(ENGLISH) == _table_rows(CHINESE)


def test_the_figures_are_the_same():
    """A number that was measured again is changed in both."""
    figure = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e[+-]?\d+)?(?![\w])")
    english, chinese = (
        sorted(figure.findall(re.sub(r"\]\([^)]*\)", "]", prose_of(path)))) for path in (ENGLISH, CHINESE)
    )
    assert english == chinese


def test_the_links_are_the_same():
    own = {"README.md", "README.zh-CN.md"}
    english, chinese = (
        [link for link in links_of(path) if link not in own and not link.startswith("#")] for path in (ENGLISH, CHINESE)
    )
    assert english == chinese


@pytest.mark.parametrize(("page", "twin"), [(ENGLISH, CHINESE), (CHINESE, ENGLISH)], ids=["english", "chinese"])
def test_each_leads_to_the_other(page, twin):
    assert twin.name in links_of(page)
