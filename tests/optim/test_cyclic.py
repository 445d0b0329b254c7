"""Block after block: one block moves at a time, only it has moments, and a saved run goes on where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.optim.cyclic import Cyclic


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))


def _step(model, optimizer, step):
    optimizer.zero_grad()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()
    optimizer.step()


def _gso(model, **options):
    return gs.GSO(model, lr=1e-2, backend="eager", schedule="cyclic", **options)


def test_one_block_moves_and_only_it_has_moments():
    model = _model()
    optimizer = _gso(model, switch_every=2)
    for step in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        _step(model, optimizer, step)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        block = step // 2
        assert moved == [t // 2 == block for t in range(6)]
        assert {id(p) for p in optimizer.state} == {id(p) for p in list(model.parameters())[2 * block : 2 * block + 2]}


@pytest.mark.parametrize("order", ["fixed", "random", "energy"])
def test_saved_in_the_middle(order):
    whole = _model()
    straight = _gso(whole, switch_every=2, order=order)
    for step in range(9):
        _step(whole, straight, step)
    model = _model()
    first = _gso(model, switch_every=2, order=order)
    for step in range(5):
        _step(model, first, step)
    resumed = _gso(model, switch_every=2, order=order, seed=99)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(5, 9):
        _step(model, resumed, step)
    for mine, true in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("order", ["fixed", "random", "energy"])
def test_every_block_once_a_cycle(order):
    cyclic = Cyclic([f"h.{i}.w" for i in range(5)], switch_every=1, order=order)
    seen = []
    for _ in range(10):
        cyclic.begin_step(lambda: [1.0, 9.0, 3.0, 0.0, 4.0])
        seen.append(cyclic.active)
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    if order == "energy":
        assert seen[:5] == [1, 4, 2, 0, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": "up"}, "order='up'"),
        ({"switch_every": 0}, "switch_every=0"),
        ({"in_backward": True}, "one of the two"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        _gso(_model(), **options)


def test_one_block_is_no_cycle():
    with pytest.raises(ValueError, match="at least two blocks"):
        _gso(nn.Sequential(nn.Linear(2, 2)))
