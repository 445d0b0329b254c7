"""A table with measured numbers names the file they came from, and the file holds them.

On a line of its own before the table stands `<!-- evidence: path -->`. If the path is a test, that test has the
numbers. Else it is a JSON or CSV file of raw results: each number of the table that has a decimal point must be a
number in it, or the median or mean of one of its lists, at the digits shown; and the section says on what hardware,
when, and over how many seeds or runs.

A paragraph or list in the README whose numbers were measured stands right after `<!-- figures: path -->`, and is held
to the file in the same way.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, relative
from tests.docs.markdown import pages, prose_of

_MARK = re.compile(r"<!-- evidence: (\S+) -->")
_NUMBER = re.compile(r"(?<![\w.])-?\d*\.\d+(?![\w.])")


def _tables(prose: str):
    """Every table with its evidence mark (or None) and its section's text."""
    for section in re.split(r"^(?=#{1,6} )", prose, flags=re.MULTILINE):
        for table in re.finditer(r"(?:^\|.*\n?)+", section, re.MULTILINE):
            lines = section[: table.start()].rstrip().splitlines()
            mark = _MARK.fullmatch(lines[-1]) if lines else None
            yield table[0], mark[1] if mark else None, section


def _results(path: Path) -> list[float]:
    """Every number of a file of raw results, and the usual summaries of its lists and columns."""
    if path.suffix == ".csv":
        with path.open(encoding="utf8", newline="") as file:
            rows = list(csv.DictReader(file))
        held = {key: [row[key] for row in rows] for key in rows[0]}  # a column is a list
    elif path.suffix == ".jsonl":
        held = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    else:
        held = json.loads(path.read_text(encoding="utf8"))
    found: list[float] = []

    def walk(value) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
            numbers = [number for number in map(_number, value) if number is not None]
            if numbers:
                found.extend((statistics.median(numbers), statistics.fmean(numbers)))
        elif _number(value) is not None:
            found.append(_number(value))

    walk(held)
    return found


def _number(value) -> float | None:
    try:
        return None if isinstance(value, (bool, list, dict)) or value is None else float(value)
    except ValueError:
        return None


def _unproved(table: str, results: list[float]) -> list[str]:
    """The numbers of a table that no result rounds to."""
    shown = _NUMBER.findall(re.sub(r"`[^`]*`", "", table))
    return [text for text in shown if not any(_rounds_to(result, text) for result in results)]


def _rounds_to(result: float, text: str) -> bool:
    """Whether the result, or the result as a percentage, is shown as this text."""
    half = 0.5 * 10.0 ** -len(text.partition(".")[2]) * (1 + 1e-9)
    return any(abs(result * factor - float(text)) <= half for factor in (1.0, 100.0))


@pytest.mark.parametrize("page", [page for page in pages() if page.name != "CHANGELOG.md"], ids=relative)
def test_every_measured_table_is_held_by_a_file(page):
    for table, mark, section in _tables(prose_of(page)):
        first = table.splitlines()[0]
        if not _NUMBER.search(re.sub(r"`[^`]*`", "", table)):
            continue
        assert mark, f"{relative(page)}: the table {first} has numbers and no line <!-- evidence: path --> before it"
        path = ROOT / mark
        assert path.is_file(), f"{relative(page)}: {mark} is not there"
        if path.suffix == ".py":
            continue
        unproved = _unproved(table, _results(path))
        assert not unproved, f"{relative(page)}: {mark} does not hold {unproved} of the table {first}"
        for what, words in (("hardware", "core|核"), ("date", r"20\d\d-\d\d"), ("number of runs", "seed|run|种子|次")):
            assert re.search(words, section, re.IGNORECASE), (
                f"{relative(page)}: the section of the table {first} names no {what}"
            )


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_every_measured_figure_of_the_readme_is_held_by_a_file(page):
    prose = (ROOT / page).read_text(encoding="utf8")
    marked = re.findall(r"^<!-- figures: (\S+) -->\n((?:.+\n)+)", prose, re.MULTILINE)
    assert len(marked) == prose.count("<!-- figures:") > 0
    for path, text in marked:
        unproved = _unproved(text, _results(ROOT / path))
        assert not unproved, f"{page}: {path} does not hold {unproved}"


def test_a_number_that_was_not_measured_is_caught(tmp_path):
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({"rows": {"score": [0.281, 0.2849, 0.3], "label": "x"}, "share": 0.123}))
    results = _results(raw)
    assert _unproved("| rows | .285 | 0.3 | 12.3 % |", results) == []
    assert _unproved("| rows | .286 | 0.31 | 12.4 % |", results) == [".286", "0.31", "12.4"]


def test_columns_of_a_csv_are_read(tmp_path):
    raw = tmp_path / "raw.csv"
    raw.write_text("method,score\na,0.5\na,0.7\nb,0.9\n")
    assert _unproved("| median | 0.70 |", _results(raw)) == []
    assert _unproved("| median | 0.71 |", _results(raw)) == ["0.71"]


def test_a_mark_belongs_to_the_table_right_after_it():
    prose = "# a\n<!-- evidence: x.json -->\n\n| 1.5 |\n\ntext\n\n| 2.5 |\n"
    assert [(table.strip(), mark) for table, mark, _ in _tables(prose)] == [("| 1.5 |", "x.json"), ("| 2.5 |", None)]
