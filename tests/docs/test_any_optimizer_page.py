"""The pages on other optimizers hold the tables that the raw file gives."""

from __future__ import annotations

import json

import pytest

from benchmarks import any_optimizer_page, tables


def test_the_pages_are_what_the_program_writes():
    made, numbers = any_optimizer_page.make()
    held = json.loads((any_optimizer_page.FOLDER / "summary.json").read_text(encoding="utf8"))
    assert held == numbers
    for page in any_optimizer_page.PAGES:
        text = page.read_text(encoding="utf8")
        assert "<!-- table: " in text
        assert tables.filled(text, made) == text
    both = "".join(page.read_text(encoding="utf8") for page in any_optimizer_page.PAGES)
    assert all(f"<!-- table: {name} -->" in both for name in made), "a table that stands on no page"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "-"),
        ([0.31, 2.0, -0.4], "+0.3"),
        ([float("inf")], "dead"),
        ([1.0, float("inf")], "1 of 2 dead"),
        ([1e9], "> 1000"),
    ],
)
def test_a_cell_says_what_came_out(values, words):
    assert any_optimizer_page.shown(values) == words
