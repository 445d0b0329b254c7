"""Every door of the package under hypothesis: an answer, or an error that the package itself raised and worded.

The same targets as benchmarks/fuzz.py, whose campaign draws many more cases.
"""

from __future__ import annotations

import json
import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks.fuzz as fuzz
from benchmarks.fuzz.verdict import NotOurs, is_ours, outcome
from tests.architecture.sources import ROOT

EXAMPLES = {"command_lines": 15, "checkpoint_bytes": 20}
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"


@pytest.mark.parametrize("name", sorted(fuzz.TARGETS))
def test_whatever_comes_in_only_answers_and_errors_of_ours_come_out(name):
    if name == "checkpoint_bytes":
        pytest.importorskip("safetensors", reason="not run: safetensors is not installed, one of the two formats")

    @settings(max_examples=EXAMPLES.get(name, 40))
    @given(st.randoms(use_true_random=False))
    def law(rng):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert fuzz.TARGETS[name](rng) in ("ok", "refused")

    law()


@pytest.mark.parametrize("name", sorted(fuzz.TARGETS))
def test_a_target_meets_both_good_and_bad_input(name):
    if name == "checkpoint_bytes":
        pytest.importorskip("safetensors", reason="not run: safetensors is not installed, one of the two formats")
    met = {fuzz.TARGETS[name](random.Random(f"{name}/{seed}")) for seed in range(60)}
    assert met == {"ok", "refused"} or (name, met) == ("checkpoint_bytes", {"refused"})


def test_an_error_of_somebody_else_is_not_ours():
    with pytest.raises(NotOurs, match="ZeroDivisionError"):
        outcome(lambda: 1 / 0, what="nothing")
    with pytest.raises(NotOurs, match="expected something"):
        outcome(_raise_outside, what="nothing")


def _raise_outside():
    raise ValueError("expected something, but not in the package")


def test_our_own_error_is_ours():
    import gradsplit as gs

    kind, error = outcome(lambda: gs.Fixed(-1.0), what="-1")
    assert kind == "refused" and is_ours(error)


def test_the_campaign_on_record_had_its_cases_and_no_failure():
    if not RESULT.is_file():
        pytest.fail("benchmarks/results/fuzz.json is missing: python benchmarks/fuzz.py")
    held = json.loads(RESULT.read_text(encoding="utf8"))
    assert set(held["targets"]) == set(fuzz.TARGETS)
    assert held["total"]["cases"] >= 100_000
    assert held["total"]["failures"] == sum(len(target["failures"]) for target in held["targets"].values()) == 0
    assert held["total"]["answered"] + held["total"]["refused"] == held["total"]["cases"]
