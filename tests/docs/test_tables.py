"""The tables of the documentation list what is registered, in the registry's own words."""

from __future__ import annotations

import re

import pytest

import gradsplit as gs
from gradsplit.budget import BUDGETS
from gradsplit.lab.registry import REGISTRY
from gradsplit.plan import STRATEGIES
from tests.architecture.sources import ROOT

TABLES = ROOT / "docs/reference/plans-and-budgets.md"


def _table(heading: str) -> dict[str, list[str]]:
    """The rows below a heading: the name in backticks -> the other cells."""
    text = TABLES.read_text(encoding="utf8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    (body,) = [part for part in section if part.startswith(heading)]
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", body, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_strategies_in_their_own_words():
    assert _table("Strategies") == {name: [row.summary] for name, row in STRATEGIES.items()}


def test_workloads_in_their_own_words_with_their_data():
    expected = {name: [row.title, row.data_note] for name, row in REGISTRY.items()}
    rows = "\n".join(f"| `{name}` | {title} | {data} |" for name, (title, data) in expected.items())
    assert _table("Workloads") == expected, f"the table in docs/reference/plans-and-budgets.md should be:\n{rows}"


def test_budgets_are_all_there():
    assert list(_table("Budgets")) == list(BUDGETS)


@pytest.mark.parametrize(("name", "cells"), _table("Budgets").items())
def test_a_budget_is_shown_as_code_that_makes_it(name, cells):
    made = eval(cells[0].strip("`"), {"gs": gs})
    assert type(made) is BUDGETS[name]
