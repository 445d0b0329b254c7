"""The tour, `examples/tour.ipynb`: its cells run in order and print what is kept beside them, without Jupyter."""

from __future__ import annotations

import contextlib
import io
import json
import re

import pytest

from tests.architecture.sources import ROOT
from tests.docs.test_sentences import LONGEST, sentences_of, words_of

TOUR = json.loads((ROOT / "examples/tour.ipynb").read_text(encoding="utf8"))


def _text(cell) -> str:
    return "".join(cell["source"])


def _masked(text: str, cell) -> str:
    """The text without its numbers, where a cell says that they vary from machine to machine."""
    return re.sub(r"\d[\d.e+-]*", "#", text) if "numbers-vary" in cell["metadata"].get("tags", ()) else text


@pytest.mark.slow
def test_the_cells_run_and_print_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    cells = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(_text(cell), f"tour, cell {number}", "exec"), namespace)
        kept = "".join(line for output in cell["outputs"] for line in output["text"])
        assert _masked(printed.getvalue(), cell) == _masked(kept, cell), f"cell {number}"
    assert len(cells) >= 6
    assert namespace["figure"].data, "the figure is empty"
    assert min(namespace["runs"], key=lambda name: sum(namespace["runs"][name][-20:])).startswith("GSO")


def test_the_words_are_plain(tmp_path):
    page = tmp_path / "tour.md"
    page.write_text("\n\n".join(_text(c) for c in TOUR["cells"] if c["cell_type"] == "markdown"), encoding="utf8")
    assert not [sentence for sentence in sentences_of(page) if words_of(sentence) > LONGEST]


def test_the_paths_that_it_names_exist():
    named = re.findall(r"`((?:docs|examples)/[\w./-]*)`", "".join(map(_text, TOUR["cells"])))
    assert named
    assert all((ROOT / name).exists() for name in named)
