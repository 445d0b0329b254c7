"""Every page of results begins with what came out, then how to run it again; its first paragraph is held by the rest.

A number that a person wrote into the first paragraph stands again further down, in a table or a sentence that other
tests hold against raw files. What a program writes is held by that program.
"""

from __future__ import annotations

import re

import pytest

from benchmarks import any_optimizer_page, sources_page
from benchmarks.chain import tables as chain
from tests.architecture.sources import ROOT, relative
from tests.docs.markdown import anchor_of, headings_of, pages

RESULTS = ROOT / "docs/results"
PAGES = [page for page in pages() if page.parent == RESULTS]
MOST_WORDS, MOST_SECTIONS = 120, 6
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?!\w)")


def opening_of(text: str) -> tuple[str, str]:
    """The text below the heading "In short", and what follows from the next heading on."""
    found = re.match(r"# .+\n\n## In short\n\n(.*?)\n(?=## )", text, re.DOTALL)
    assert found, 'the page should begin with "## In short"'
    return found[1], text[found.end() :]


def _paragraph(opening: str) -> str:
    return re.sub(r"<!--.*?-->\n*", "", opening).strip().split("\n\n")[0]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_page_of_results_begins_with_what_came_out(page):
    opening, rest = opening_of(page.read_text(encoding="utf8"))
    words = _paragraph(opening).split()
    assert 20 <= len(words) <= MOST_WORDS, f"{relative(page)} has {len(words)} words in short"
    assert rest.startswith("## Run it again\n")
    assert re.search(r"^```", rest.split("\n## ")[0], re.MULTILINE) or "commands" in rest.split("\n## ")[0]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_long_page_has_a_list_of_its_sections(page):
    text = page.read_text(encoding="utf8")
    sections = [anchor_of(heading.text) for heading in headings_of(page) if heading.depth == 2][2:]
    if len(sections) > MOST_SECTIONS:
        lost = [name for name in sections if f"(#{name})" not in text]
        assert not lost, f"{relative(page)}: no link within the page leads to {lost}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_number_of_the_first_paragraph_stands_further_down(page):
    opening, rest = opening_of(page.read_text(encoding="utf8"))
    if "<!-- table:" not in opening:
        lost = unheld(_paragraph(opening), rest)
        assert not lost, f"{relative(page)}: {lost} of the first paragraph stand nowhere else on the page"


def unheld(paragraph: str, rest: str) -> list[str]:
    """The numbers of a paragraph that stand nowhere in the rest."""
    held = set(_NUMBER.findall(rest))
    return [number for number in _NUMBER.findall(re.sub(r"`[^`]*`", "", paragraph)) if number not in held]


def test_a_number_from_nowhere_is_caught():
    assert unheld("It wins 57 of 60, by 1.2 % in 100,000 runs.", "57 of 60; 1.3 %; 100,000") == ["1.2"]


def test_the_first_paragraphs_are_what_their_programs_write():
    made = {
        "any-optimizer": any_optimizer_page.make()[0]["in short"],
        "chain": chain.in_short(),
        "sources": sources_page.in_short(),
    }
    for name, text in made.items():
        assert text.strip() in (RESULTS / f"{name}.md").read_text(encoding="utf8"), f"write {name}.md anew"


def test_the_page_of_sources_is_what_its_program_writes(tmp_path):
    sources_page.write_page(page=tmp_path / "sources.md")
    assert (tmp_path / "sources.md").read_text(encoding="utf8") == sources_page.PAGE.read_text(encoding="utf8")
