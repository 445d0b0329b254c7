"""The laws of the share step hold, and each catches the faults that were planted for it."""

from __future__ import annotations

import pytest
import torch

import gradsplit as gs
from tests.optim.share import laws, mutants

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("law", mutants.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("make", [mutants.true, gs.GSO], ids=["definition", "default"])
def test_the_law_holds(law, make):
    law(make)


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_broken_step_is_caught(name):
    changes, law = mutants.MUTANTS[name]
    with mutants.replaced(*changes), pytest.raises(AssertionError):
        law(mutants.true)


def test_every_law_has_its_mutant():
    assert {law for _, law in mutants.MUTANTS.values()} == set(mutants.LAWS)


KINDS = (
    *("linear.bias", "words.weight", "conv2.weight", "depthwise.weight", "attention.in_proj_weight", "experts.weight"),
    *("positions", "one_row.weight", "one_column.weight", "zero.weight", "scale", "wave", "tone"),
)


@pytest.mark.parametrize("bad", laws.BAD)
@pytest.mark.parametrize("name", KINDS)
def test_a_bad_row_of_every_kind_stays_a_bad_row(name, bad):
    laws.check_a_bad_row_stays_a_bad_row(gs.GSO, name, bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_move_by_their_share_in_every_dtype(dtype):
    laws.check_rows_move_by_their_share(gs.GSO, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_outgrow_their_limit_in_any_dtype(dtype):
    laws.check_rows_do_not_outgrow_their_limit(gs.GSO, dtype)
