"""Block after block: one block moves at a time, only it has moments, and a saved run goes on where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.optim.cyclic import Cycle


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))


def _step(model, optimizer, step):
    optimizer.zero_grad()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()
    optimizer.step()


OPTIMIZERS = {
    "GSO": lambda model: gs.GSO(model, lr=1e-2, backend="eager", direction="adam"),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "SGD with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
}


def _cyclic(model, name="GSO", **options):
    optimizer = OPTIMIZERS[name](model)
    return optimizer, gs.CyclicBlocks(optimizer, model, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_block_moves_and_only_it_has_a_state(name):
    model = _model()
    optimizer, _ = _cyclic(model, name, switch_every=2)
    for step in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        _step(model, optimizer, step)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        block = step // 2
        assert moved == [t // 2 == block for t in range(6)]
        assert {id(p) for p in optimizer.state} == {id(p) for p in list(model.parameters())[2 * block : 2 * block + 2]}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("order", ["fixed", "random", "energy"])
def test_saved_in_the_middle(order, name):
    whole = _model()
    straight, _ = _cyclic(whole, name, switch_every=2, order=order)
    for step in range(9):
        _step(whole, straight, step)
    model = _model()
    first, turns = _cyclic(model, name, switch_every=2, order=order)
    for step in range(5):
        _step(model, first, step)
    turns.remove()
    resumed, its_turns = _cyclic(model, name, switch_every=2, order=order, seed=99)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    its_turns.load_state_dict(copy.deepcopy(turns.state_dict()))
    for step in range(5, 9):
        _step(model, resumed, step)
    for mine, true in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("order", ["fixed", "random", "energy"])
def test_every_block_once_a_cycle(order):
    cycle = Cycle([f"h.{i}.w" for i in range(5)], switch_every=1, order=order)
    seen = []
    for _ in range(10):
        cycle.begin_step(lambda: [1.0, 9.0, 3.0, 0.0, 4.0])
        seen.append(cycle.active)
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    if order == "energy":
        assert seen[:5] == [1, 4, 2, 0, 3]


def test_the_gradients_of_idle_blocks_stay_where_they_are():
    model = _model()
    optimizer, cyclic = _cyclic(model, "AdamW", switch_every=1)
    _step(model, optimizer, 0)
    assert all(p.grad is not None for p in model.parameters())
    cyclic.remove()
    before = [p.detach().clone() for p in model.parameters()]
    _step(model, optimizer, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "said"), [({"order": "up"}, "order='up'"), ({"switch_every": 0}, "switch_every=0")]
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        _cyclic(_model(), **options)


def test_updates_in_backward_are_refused():
    model = _model()
    with pytest.raises(ValueError, match="Leave one of the two out"):
        gs.CyclicBlocks(gs.GSO(model, in_backward=True, direction="adam"), model)


def test_one_block_is_no_cycle():
    with pytest.raises(ValueError, match="at least two blocks"):
        _cyclic(nn.Sequential(nn.Linear(2, 2)))


def test_the_state_of_other_blocks_is_refused():
    _, cyclic = _cyclic(_model())
    state = cyclic.state_dict()
    with pytest.raises(ValueError, match="expected a cycle over"):
        cyclic.load_state_dict({**state, "blocks": ["0", "9"]})


def test_optimizer_and_model_in_the_wrong_order_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"CyclicBlocks\(Sequential, …\): .* Write CyclicBlocks\(optimizer, model\)"):
        gs.CyclicBlocks(model, optimizer)
    with pytest.raises(TypeError, match=r"CyclicBlocks\(…\): expected a model or pairs .* got NoneType"):
        gs.CyclicBlocks(optimizer, None)
    with pytest.raises(ValueError, match=r"switch_every=1.5\): expected a whole number of steps >= 1"):
        gs.CyclicBlocks(optimizer, model, switch_every=1.5)
