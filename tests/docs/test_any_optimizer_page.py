"""The pages on other optimizers hold the tables that the raw file gives."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.architecture.sources import ROOT


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "any_optimizer_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_program_writes(program):
    made, numbers = program.tables()
    held = json.loads((program.FOLDER / "summary.json").read_text(encoding="utf8"))
    assert held == numbers
    for page in program.PAGES:
        text = page.read_text(encoding="utf8")
        assert "<!-- table: " in text
        assert program.filled(text, made) == text


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
def test_a_cell_says_what_came_out(program, values, words):
    assert program.shown(values) == words
