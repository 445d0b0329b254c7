"""docs/results/speed.md holds the figures of its raw results, written by the program that measured them."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from tests.architecture.sources import ROOT


def _program():
    spec = importlib.util.spec_from_file_location("speed_page", ROOT / "benchmarks" / "speed_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _copies(folder):
    for place in ("docs/results/speed.md", "benchmarks/results/speed.json"):
        (folder / place).parent.mkdir(parents=True)
        shutil.copy(ROOT / place, folder / place)
    return folder / "benchmarks/results/speed.json", folder / "docs/results/speed.md"


def test_the_page_is_what_the_program_writes(tmp_path):
    raw, page = _copies(tmp_path)
    _program().write_page(raw, page)
    assert page.read_text(encoding="utf8") == (ROOT / "docs/results/speed.md").read_text(encoding="utf8"), (
        "run benchmarks/speed.py with --write-docs, or write_page(…) on its raw results"
    )


def test_another_result_gives_another_page(tmp_path):
    raw, page = _copies(tmp_path)
    results = json.loads(raw.read_text(encoding="utf8"))
    results["figures"][0]["value"] = 123.0
    raw.write_text(json.dumps(results), encoding="utf8")
    _program().write_page(raw, page)
    assert "| 123 |" in page.read_text(encoding="utf8")


def test_a_page_without_the_section_is_refused(tmp_path):
    raw, page = _copies(tmp_path)
    page.write_text("# Speed\n", encoding="utf8")
    with pytest.raises(ValueError, match="expected one section '## Figures as measured'"):
        _program().write_page(raw, page)
    assert page.read_text(encoding="utf8") == "# Speed\n"
