"""docs/results/README.md: what a sentence says of a result is made from the results; a person writes none of it."""

from __future__ import annotations

import copy
import json
import re

import pytest

from benchmarks.proof import numbers, page, plan, store

_MEASURED = re.compile(r"(?<![\w.])\d*\.\d+|\d+(?= %)|\b\d+ of \d+\b")


def _written_by_hand() -> str:
    """The page without what the program writes, fences, comments, versions and code."""
    text = page.PAGE.read_text(encoding="utf8")
    for mark in (r"<!-- table: ([\w-]+) -->.*?<!-- end: \1 -->", r"```.*?```", r"`[^`]*`", r"torch \d+\.\d+\.\d+"):
        text = re.sub(mark, "", text, flags=re.DOTALL)
    return text


def _settings() -> set[str]:
    """The numbers that were given to the runs: rates, overlaps, where the cosine ends, the length of the text."""
    rates = [
        lr
        for table in (plan.RATES, plan.LARGE_RATES, *plan.MORE_RATES.values())
        for row in table.values()
        for lr in row
    ]
    return {f"{lr:g}" for lr in rates} | {"0.5", "0.95", "1", f"{plan.CHARACTERS / 1e6:.1f}"}


def test_no_result_is_written_by_hand():
    found = set(_MEASURED.findall(_written_by_hand()))
    assert "0.03" in found, "GSO's default is named"
    assert found <= _settings(), f"{sorted(found - _settings())}: let benchmarks/proof/words.py write the sentence"


def test_a_result_written_by_hand_is_seen():
    assert _MEASURED.findall("first in 3 of 4, 12 % ahead at .93 and 0.931") == ["3 of 4", "12", ".93", "0.931"]


@pytest.fixture(scope="module")
def held():
    return json.loads(store.TABLES.read_text(encoding="utf8"))


def test_the_numbers_are_what_the_runs_give(held):
    assert json.loads(json.dumps(numbers.numbers())) == held, "run benchmarks/proof.py page"


def _of(rows, **wanted):
    return next(row for row in rows if all(row[name] == value for name, value in wanted.items()))


def _opening(made):
    made["count"]["first"] = 77


def _behind(made):
    row = made["rows"][0]
    row.update(margin=-0.5, rank=8, of=8, best_other="lion", shared=3, ahead_on=1)


def _nowhere_behind(made):
    for row in made["rows"]:
        row["margin"] = 0.0


def _cosine(made):
    made["cosine"][0]["methods"]["lion"] = {"fresh": None, "choosing": 0.1}


def _time(made):
    made["costs"]["control"]["gso"]["over_adamw"] = 77.0


def _photographs(made):
    made["photographs"]["gso"]["map50"]["median"] = 0.99


def _sensitivity(made):
    _of(made["sensitivity"], size="160 k", method="gso")["sensitivity"] = 0.01


def _lost(made):
    made["sensitivity"][0]["attention"][0] = None


def _attention(made):
    for row in made["sensitivity"]:
        if row["method"] == "gso":
            row["attention"][-1] = 77.0


def _partition(made):
    made["sensitivity"][0]["log_partition"][0] = -77.0


def _outputs(made):
    made["outputs"][0]["log_partition_over_steps"][0] = -77.0


def _strategies(made):
    plans = _of(made["strategies"], workload="experts")["plans"]
    plans["gso-lbf"]["median"] = 0.5 * plans["gso"]["median"]


def _sizes(made):
    methods = made["sizes"][0]["methods"]
    methods["muon"]["score"] = 0.5 * methods["gso"]["score"]


def _at_an_end(made):
    row = made["sizes"][0]
    row["rates"] = {"soap": [0.003, 0.001, row["methods"]["soap"]["lr"]]}


def _short(made):
    muon = next(row for row in made["short"] if row["method"] == "muon" and row["parameters"] < 2e6)
    ours = _of(made["short"], method="gso", lr=0.03, parameters=muon["parameters"])
    ours["score"] = 0.5 * muon["score"]


@pytest.mark.parametrize(
    ("change", "part", "said"),
    [
        (_opening, "opening", "the best in 77 tasks"),
        (_opening, "count", "first in 77 of"),
        (_behind, "behind", "GSO ranks last. Lion is ahead by 50.0 %, on 2 of 3 seeds. We do not know why."),
        (_nowhere_behind, "behind", "In no row."),
        (_cosine, "cosine-words", "Lion loses most"),
        (_time, "time-words", "to 77.00 times"),
        (_time, "opening", "at most 77.00 times"),
        (_photographs, "photographs-words", "At an overlap of 0.5 GSO, "),
        (_sensitivity, "sensitivity-words", "160 k parameters, 200 steps: a rate matters least to GSO (0.01)"),
        (_lost, "sensitivity-words", "1 of "),
        (_attention, "attention-words", "77 to 77 with GSO"),
        (_partition, "partition-words", "between -77.0 and"),
        (_outputs, "outputs-words", "We provoked it: log Z stays between -77.0"),
        (_strategies, "strategies-words", "changes the median by +50.0 %"),
        (_sizes, "sizes-words", "400 steps: GSO at its default is 100.0 % behind Muon"),
        (_at_an_end, "sizes-words", "of the others. SOAP: best at an end of the rates"),
        (_short, "short-words", "+50.0 % at its default"),
    ],
)
def test_a_sentence_follows_its_numbers(held, change, part, said):
    made = copy.deepcopy(held)
    change(made)
    text = " ".join(page.parts(made)[part].split())
    assert said not in " ".join(page.parts(held)[part].split())
    assert said in text


def test_every_part_has_its_place_in_the_page(held):
    text = page.PAGE.read_text(encoding="utf8")
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == set(page.parts(held))
