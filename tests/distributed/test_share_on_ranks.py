"""GSO by share on two ranks: the weights of one process, and a stated number of collectives per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import gradsplit as gs
from tests.distributed.models import batch, make_net, shard, weights_of
from tests.distributed.ranks import counted, on_ranks

STEPS = 5
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "a linear decay": {"steps": STEPS},
    "blocks": {"blocks": {"*wide.weight": 37, "*conv.weight": 11}},
    "all Adam": {"direction": {"*": "adam"}},
    "shortened": {},
    "columns": {"plan": lambda layout: gs.xsp(layout, axis=1)},
}
SHARDED_MATRICES = {"ddp": 0, "hsdp": 0, "fsdp": 6, "tp": 2}  # hsdp: two replicas, each whole on one rank


def collectives(mode: str, variant: str) -> tuple[int, int]:
    """All-reduces and all-gathers per step: none for replicas.

    Of shards three sums, since some rows lie on several ranks (norms, lengths of directions, lengths afterwards), and
    one all-gather for each sharded matrix whose direction is orthogonal. Of replicas held whole the norms alone.
    """
    if mode == "ddp":
        return 0, 0
    if mode == "hsdp":
        return 1, 0
    return 3, 0 if variant == "all Adam" else SHARDED_MATRICES[mode]


def train(model: nn.Module, optimizer: gs.GSO) -> list[tuple[int, int]]:
    """Train, with one batch that is scaled as a whole; return all-reduces and other collectives of each step."""
    made, (part,) = [], optimizer._parts
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y) * (1e6 if step == 3 else 1.0)
        loss.backward()
        calls: list[str] = []
        with counted(calls), CommDebugMode() as gathers:
            optimizer.step()
        assert set(calls) <= {"all_reduce"}
        made.append((len(calls), gathers.get_total_counts() - len(calls)))
        assert (float(part.update.collected) < 1) == (step == 3), "the collective rule fires at the scaled batch alone"
    return made


def run(model: nn.Module, variant: str, **options: Any) -> tuple[dict[str, torch.Tensor], Any, Any]:
    optimizer = gs.GSO(model, **VARIANTS[variant], **options)
    if variant == "shortened":
        optimizer._series.of_late.fill_(28.0)
    made = train(model, optimizer)
    (part,) = optimizer._parts
    update = part.update
    return weights_of(model), made, (update.recent_B, update.most_B, update.collected, update.series.of_late)


def work(rank: int, world: int) -> dict[Any, Any]:
    return {
        (mode, variant): run(shard(make_net(), mode, world), variant)
        for mode in SHARDED_MATRICES
        for variant in VARIANTS
    }


def test_two_ranks_make_the_steps_of_one_process() -> None:
    alone = {variant: run(make_net(), variant) for variant in VARIANTS}
    answers = on_ranks(2, work)
    for answer in answers:
        for (mode, variant), (weights, made, history) in answer.items():
            true_weights, _, true_history = alone[variant]
            assert made == [collectives(mode, variant)] * STEPS, (mode, variant)
            for mine, first, true in zip(history, answers[0][mode, variant][2], true_history, strict=True):
                assert torch.equal(mine, first), (mode, variant)  # the same bits on every rank
                torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-9)
            for name, weight in true_weights.items():
                torch.testing.assert_close(
                    weights[name],
                    weight,
                    rtol=0,
                    atol=1e-9,
                    msg=lambda m, key=(mode, variant), n=name: f"{key} {n}: {m}",
                )


INSIDE = ("fsdp", "hsdp")


def train_inside(model: nn.Module, scaled: int | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train with updates inside backward; return the weights, and the smallest collective factor of each step."""
    optimizer, factors = gs.GSO(model, in_backward=True, fused=False), []
    for step in range(STEPS):
        x, y = batch(step)
        x = x / x.std()  # the rule sees some tensors before others, which makes it keener
        (torch.nn.functional.cross_entropy(model(x), y) * (1e6 if step == scaled else 1.0)).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        factors.append(min(float(part.update.collected) for part in optimizer._parts))
    return weights_of(model), factors


def work_inside(rank: int, world: int) -> dict[Any, Any]:
    return {
        (mode, scaled): train_inside(shard(make_net(), mode, world), scaled)
        for mode in INSIDE
        for scaled in (None, STEPS - 1)
    }


def test_inside_backward_two_ranks_make_the_steps_of_one_process() -> None:
    """FSDP2 completes gradients in another order. The median over those that have come is another one then."""
    true_weights, ones = train_inside(make_net())
    answers = on_ranks(2, work_inside)
    for answer in answers:
        for mode in INSIDE:
            weights, factors = answer[mode, None]
            assert factors == ones == [1.0] * STEPS
            for name, weight in true_weights.items():
                torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            weights, factors = answer[mode, STEPS - 1]
            assert factors[:-1] == [1.0] * (STEPS - 1) and factors[-1] < 1e-2
            assert all(torch.equal(w, answers[0][mode, STEPS - 1][0][name]) for name, w in weights.items())
