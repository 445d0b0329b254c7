"""An out-of-memory error inside a step: what is said, and that weights and histories are as before the step."""

from __future__ import annotations

import copy

import pytest
import torch

import gradsplit as gs
from gradsplit.kernels.eager import EagerKernel

BUDGETS = {
    "a history, and the root": {"bin": gs.Ema(1.5, warmup=1), "root": gs.Fixed(3.0)},
    "the default in front of AdamW": None,
}


def made(budget, *, steps=4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    splitter = gs.GradientSplitter(model, budget=budget, optimizer=optimizer, backend="eager")
    for _ in range(steps):
        refill(model)
        splitter.step()
    return model, splitter


def refill(model, size=1.0):
    for p in model.parameters():
        p.grad = torch.randn_like(p) * size


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _tensors(state):
    return [x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("place", ["squares", "scale_"])
def test_weights_and_histories_are_as_before_and_the_next_step_goes_on(budget, place, monkeypatch):
    model, splitter = made(BUDGETS[budget])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(splitter.state_dict())
    refill(model, 100.0)
    gradients = [p.grad.clone() for p in model.parameters()]

    def no_memory(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(EagerKernel, place, no_memory)
        with pytest.raises(
            torch.cuda.OutOfMemoryError, match=r"GradientSplitter.step\(\): .*2 GiB.*as before the step"
        ):
            splitter.step()
    assert same(model.state_dict(), weights)
    assert same(splitter.state_dict(), state)
    assert splitter.step_count == state["step_count"]
    other_model, other = made(BUDGETS[budget])
    for (p, q), gradient in zip(zip(model.parameters(), other_model.parameters(), strict=True), gradients, strict=True):
        p.grad, q.grad = gradient.clone(), gradient.clone()
    splitter.step()
    other.step()
    assert same([p.grad for p in model.parameters()], [p.grad for p in other_model.parameters()])
    assert same(splitter.state_dict(), other.state_dict())


def test_a_copy_without_memory_leaves_all_gradients_as_they_were(monkeypatch):
    """All copies of small tensors are made before the first one is written back."""
    model, splitter = made({"bin": gs.Fixed(0.1)})
    refill(model, 100.0)
    gradients = [p.grad.clone() for p in model.parameters()]
    scaled, calls = EagerKernel._scaled, []

    def second_time(kernel, *given):
        calls.append(given)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return scaled(kernel, *given)

    monkeypatch.setattr(EagerKernel, "_scaled", second_time)
    monkeypatch.setattr("gradsplit.kernels.eager.PACKED", 8)
    splitter.kernel._known.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        splitter.step()
    assert len(calls) == 2
    assert same([p.grad for p in model.parameters()], gradients)
