"""A pipeline of two stages, one process each: a limit at the root bounds both together, as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradsplit as gs
from tests.distributed.ranks import counted, on_ranks

STEPS = 12
BUDGETS: dict[str, Any] = {
    "constant": {"root": gs.Fixed(0.2), "bin": gs.Relative(0.2)},
    "history": {"root": (gs.Ema(1.1, warmup=2), gs.Relative(0.05)), "tensor": gs.Fixed(2.0)},
    "root alone": {"root": gs.Fixed(0.3)},
    "the step": {"root": gs.RelativeStep(1e-3), "bin": gs.RelativeStep(0.03)},
}


def make_stages() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first, second = (
        nn.Sequential(nn.Linear(5, 7), nn.Tanh()),
        nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 2)),
    )
    return first.double(), second.double()


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 5, generator=generator, dtype=torch.float64) * (20 if step % 5 == 3 else 1)


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return (out - 1).square().sum()


def split(model: nn.Module, budget: Any, **options: Any) -> tuple[torch.optim.Optimizer, gs.GradientSplitter]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, gs.GradientSplitter(model, budget=budget, optimizer=optimizer, **options)


def stage(rank: int, world: int, name: str, poison: bool) -> Any:
    model = make_stages()[rank]
    optimizer, splitter = split(model, BUDGETS[name], stages=dist.group.WORLD)
    factors, made = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        signal = torch.empty(6, 7, dtype=torch.float64)
        if rank == 0:
            out = model(batch(step))
            dist.send(out.detach(), 1)
            dist.recv(signal, 1)
            out.backward(signal)
        else:
            dist.recv(signal, 0)
            signal.requires_grad_()
            loss_of(model(signal)).backward()
            dist.send(signal.grad, 0)
            if poison and step == 2:
                model[0].weight.grad[1, 2] = float("nan")
        calls: list[str] = []
        with counted(calls):
            record = splitter.step()
        made.append(calls)
        factors.append(record.decision.limit_N[0])
        optimizer.step()
    assert made == [["all_reduce"]] * STEPS  # nothing is sharded: the stages' sums are all that is sent
    return list(model.state_dict().values()), factors


def whole(name: str, poison: bool) -> list[torch.Tensor]:
    first, second = make_stages()
    model = nn.Sequential(first, second)
    optimizer, splitter = split(model, BUDGETS[name])
    bounded = 0
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(batch(step))).backward()
        if poison and step == 2:
            second[0].weight.grad[1, 2] = float("nan")
        kept = splitter.step()
        root = float(kept.norm_after_B().square().sum().sqrt())
        bounded += root > 0.999 * float(kept.decision.limit_N[0])
        optimizer.step()
    assert bounded  # a root that never binds would show nothing
    return [*first.state_dict().values(), *second.state_dict().values()]


GSO_BUDGETS: dict[str, Any] = {
    "constant": {"root": gs.Fixed(0.02), "bin": (gs.Relative(0.2), gs.RelativeStep(0.03))},
    "the step": {"root": gs.RelativeStep(0.01), "bin": gs.Relative(0.2)},
}


def stage_of_gso(rank: int, world: int, name: str) -> Any:
    model = make_stages()[rank]
    optimizer = gs.GSO(model, lr=0.05, budget=GSO_BUDGETS[name], stages=dist.group.WORLD, direction="adam")
    for step in range(STEPS):
        optimizer.zero_grad()
        signal = torch.empty(6, 7, dtype=torch.float64)
        if rank == 0:
            out = model(batch(step))
            dist.send(out.detach(), 1)
            dist.recv(signal, 1)
            if step != 2:  # a stage without any gradient takes part all the same
                out.backward(signal)
        else:
            dist.recv(signal, 0)
            signal.requires_grad_()
            loss_of(model(signal)).backward()
            dist.send(signal.grad, 0)
        optimizer.step()
    return list(model.state_dict().values())


@pytest.mark.parametrize("name", GSO_BUDGETS)
def test_gso_equals_one_process(name: str) -> None:
    mine = [tensor for answer in on_ranks(2, stage_of_gso, name) for tensor in answer]
    first, second = make_stages()
    loose_first, loose_second = make_stages()
    model, loose = nn.Sequential(first, second), nn.Sequential(loose_first, loose_second)
    below = {level: budget for level, budget in GSO_BUDGETS[name].items() if level != "root"}
    optimizers = (
        gs.GSO(model, lr=0.05, budget=GSO_BUDGETS[name], direction="adam"),
        gs.GSO(loose, lr=0.05, budget=below, direction="adam"),
    )
    for step in range(STEPS):
        for net, front, optimizer in zip((model, loose), (first, loose_first), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net(batch(step))).backward()
            if step == 2:
                front.zero_grad()
            optimizer.step()
    true = [*first.state_dict().values(), *second.state_dict().values()]
    for tensor, whole_tensor in zip(mine, true, strict=True):
        torch.testing.assert_close(tensor, whole_tensor, rtol=0, atol=1e-7)
    assert any(not torch.allclose(a, b) for a, b in zip(model.parameters(), loose.parameters(), strict=True))


@pytest.mark.parametrize("poison", [False, True], ids=["finite", "a NaN on one stage"])
@pytest.mark.parametrize("name", BUDGETS)
def test_equals_one_process(name: str, poison: bool) -> None:
    (first, limits), (second, other_limits) = on_ranks(2, stage, name, poison)
    assert limits == other_limits  # the same bits on every stage
    for mine, true in zip([*first, *second], whole(name, poison), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-9)


def test_the_nearest_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule='bottom_up'"):
        gs.GradientSplitter(
            make_stages()[0], budget={"root": gs.Fixed(1.0)}, rule="nearest", stages=dist.ProcessGroup(0, 1)
        )
