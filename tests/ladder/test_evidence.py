"""The tables of docs/results/ladder.md and diagnose.md are those of the raw results beside them."""

from __future__ import annotations

import json

from benchmarks.ladder import page


def test_the_tables_of_the_page_are_written_from_the_raw_results():
    texts = [place.read_text(encoding="utf8") for place in page.PAGES]
    assert [page.with_tables(text) for text in texts] == texts, "run: python benchmarks/ladder.py page"
    assert all(f"<!-- table: {name} -->" in "".join(texts) for name in page.TABLES)


def test_a_changed_figure_is_noticed():
    text = page.PAGE.read_text(encoding="utf8")
    assert "-4.69e-3" in text
    assert page.with_tables(text.replace("-4.69e-3", "-4.70e-3", 1)) == text


def test_the_recipe_kills_every_shorter_arithmetic_within_a_dozen_steps():
    raw = json.loads((page.RESULTS / "ladder-recipe.json").read_text(encoding="utf8"))
    for bin_ in raw["bins"].values():
        assert 0 < bin_["float32_dies_at"] <= bin_["float64_dies_at"] <= 12
        assert len(bin_["log10_magnitude"]) == 292
