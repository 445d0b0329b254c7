"""The kink: the step at which the first branches change sides."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradsplit as gs
from gradsplit.ladder import ladder_of_model, taylor_ladder
from gradsplit.ladder.kinks import kink_of


def _kink(function, x, direction):
    point = {"x": torch.tensor(x, dtype=torch.float64)}
    ladder = taylor_ladder(lambda p: function(p["x"]).sum(), point, {"x": torch.tensor(direction)}, order=4)
    return ladder.kink_B[0]


@pytest.mark.parametrize(
    ("function", "x", "direction", "kink"),
    [
        (F.relu, [3.0, 1.0], [-1.0, 1.0], 3.0),
        (F.relu, [3.0, 1.0], [1.0, 1.0], math.inf),
        (torch.abs, [-2.0], [4.0], 0.5),
        (lambda x: x.clamp(0, 1), [0.5], [1.0], 0.5),
        (lambda x: x.amax(), [1.0, 0.0, -1.0], [0.0, 1.0, 3.0], 2 / 3),
        (lambda x: torch.maximum(x[0], x[1]), [1.0, 0.0], [0.0, 2.0], 0.5),
        (lambda x: F.max_pool2d(x.reshape(1, 1, 2, 2), 2), [4.0, 3.0, 2.0, 1.0], [0.0, 0.5, 0.0, 0.0], 2.0),
        (lambda x: x.amin(), [-1.0, 0.0, 1.0], [0.0, -1.0, -3.0], 2 / 3),
        (lambda x: x.min(0)[0], [0.0, 1.0], [0.0, -2.0], 0.5),
        (lambda x: x.norm(math.inf), [-1.0, 0.5], [0.0, 1.0], 0.5),
        (lambda x: F.max_pool2d(x.reshape(1, 1, 1, 2), (1, 2), padding=(0, 1)), [-2.0, -1.0], [1.0, 0.0], math.inf),
        (lambda x: F.max_pool2d(x.reshape(1, 1, 1, 3), 3, padding=1), [-3.0, -2.0, -4.0], [1.0, -1.0, 0.0], 0.5),
        (lambda x: x.topk(2)[0], [3.0, 2.0, 1.0], [-1.5, 0.0, 0.0], 4 / 3),
        (lambda x: x.topk(1, largest=False)[0], [3.0, 2.0, 1.0], [-1.0, 0.0, 0.0], 2.0),
        (lambda x: x.sort()[0] * torch.arange(3), [3.0, 1.0, 2.0], [-1.0, 0.0, 0.0], 1.0),
        (lambda x: x.sort(descending=True)[0] * torch.arange(3), [3.0, 1.0, 2.0], [0.0, 4.0, 0.0], 0.25),
        (torch.tanh, [1.0], [1.0], math.inf),
    ],
)
def test_the_first_crossing_in_closed_form(function, x, direction, kink):
    assert _kink(function, x, direction) == pytest.approx(kink)


def test_masks_decide_nothing():
    def attention(x):
        return F.softmax(x.masked_fill(torch.tensor([False, True, False]), -torch.inf), 0)[0]

    assert _kink(attention, [0.0, 1.0, 2.0], [1.0, -1.0, 3.0]) == math.inf


def test_the_share_of_decisions_is_a_quantile():
    steps = [torch.arange(1.0, 101.0)[None].double()]
    assert kink_of(steps, 1, share=0.25).tolist() == [25.0]
    assert kink_of(steps, 1, share=1e-9).tolist() == [1.0]


def test_each_bin_has_its_own_kink_and_it_ends_the_safe_step():
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    batch = torch.randn(64, 3, dtype=torch.float64), torch.randint(2, (64,))

    def loss_fn(m, b):
        return F.cross_entropy(m(b[0]), b[1])

    ladder = ladder_of_model(model, loss_fn, batch, bins=gs.per_tensor(gs.layout_of(model)), order=10)
    kinks = dict(zip(ladder.names, ladder.kink_B, strict=True))
    assert kinks["2.weight"] == kinks["2.bias"] == math.inf  # nothing bends behind the last ReLU
    assert 0 < kinks["0.weight"] < math.inf
    ends = dict(zip(ladder.names, ladder.limited_by, strict=True))
    assert ends["0.weight"] == "kink"
    assert (ladder.safe_step_B <= ladder.kink_B).all()
    assert (ladder.reach_B <= ladder.radius_B).all()
