"""Bars on the number of operations that one warm step dispatches on a GPT of 145 tensors, views left out."""

from __future__ import annotations

import pytest
import torch

import gradsplit as gs
from tests.optim.launches import GPT, Launches, gpt, launches

BARS = {
    "GSO, eager": (lambda model: gs.GSO(model, backend="eager").step, 900),
    "GSO, eager, capturable": (lambda model: gs.GSO(model, backend="eager", capturable=True).step, 900),
    "GSO, eager, two groups": (
        lambda model: (
            gs.GSO(
                [
                    {"params": list(model.blocks[:6].parameters())},
                    {"params": list(model.blocks[6:].parameters()), "lr": 0.02},
                ],
                backend="eager",
            ).step
        ),
        1_100,
    ),
}
"""Name -> (what makes the step of a model, the most that it may dispatch)."""


@pytest.mark.parametrize("name", BARS)
def test_a_warm_step_dispatches_few_operations(name):
    make, most = BARS[name]
    model = gpt()
    assert len(list(model.parameters())) == 145
    seen = launches(model, make(model))
    assert seen.total() <= most, f"{seen.total()}: {seen.most_common(12)}"


def test_the_number_of_operations_does_not_depend_on_the_number_of_blocks():
    few, many = gpt(blocks=3), gpt(blocks=12)
    counts = [launches(model, gs.GSO(model, backend="eager").step).total() for model in (few, many)]
    assert counts[0] == counts[1]


def test_a_step_of_the_eager_path_reads_no_number_back():
    model = gpt(blocks=2)
    seen = launches(model, gs.GSO(model, backend="eager").step)
    assert not [name for name in seen if any(word in name for word in ("local_scalar", "nonzero", "equal"))]


def test_the_count_sees_every_operation_and_no_view():
    x = torch.ones(2, 3)
    with Launches() as mode:
        x.t().add_(1)
        x[0].view(3, 1).sum().item()
    assert mode.seen == {"aten::add_.Tensor": 1, "aten::sum": 1, "aten::_local_scalar_dense": 1}
    assert len(list(GPT().parameters())) == 145
