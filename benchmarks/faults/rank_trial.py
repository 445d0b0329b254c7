"""One run on several ranks, each with its share of every batch, and a fault on the last rank alone.

Three places for the fault:

- "before": in the rank's own gradient, before DistributedDataParallel has averaged it. The average of all ranks has it.
- "after": in the rank's copy of the averaged gradient, as a fault of its memory would be. No other rank sees it.
- "shard": in the rank's shard of the averaged gradient under FSDP2. No other rank has this piece.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.faults.events import FAULTS, Fault, faulty_steps
from benchmarks.faults.methods import METHODS, Split
from benchmarks.faults.workloads import WORKLOADS
from gradsplit import GradientSplitter, Relative
from gradsplit.lab.optimizers import make_schedule
from gradsplit.lab.task import Task

__all__ = ["PLACES", "RANK_FAULTS", "RANK_METHODS", "STEPS", "RankTrial", "run_on_rank"]

STEPS = 200
PLACES = ("before", "after", "shard")
_LOOK_EVERY = 10  # steps between two looks at whether the weights are finite


def _all_become(value: float) -> Callable[[Sequence[Tensor], torch.Generator], None]:
    def act(tensors: Sequence[Tensor], _: torch.Generator) -> None:
        for tensor in tensors:
            tensor.fill_(value)

    return act


RANK_FAULTS: dict[str, Fault] = {
    fault.name: fault
    for value in ("nan", "inf", "3e38")
    for fault in (
        FAULTS[f"{value} in one element"],
        Fault(f"{value} in all of the rank", on_gradients=_all_become(float(value))),
    )
}


class SplitBefore(Split):
    """The splitter, and another that bounds each rank's own gradient before it is averaged."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(task, optimizer)
        sgd = isinstance(optimizer, torch.optim.SGD)
        self.own = GradientSplitter(
            task.model, budget=None if sgd else Relative(0.2), optimizer=optimizer if sgd else None
        )


class SplitAndRenew(Split):
    """The splitter; every twenty steps all ranks take over the first rank's weights and optimizer states."""

    every = 20

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(task, optimizer)
        self.step = 0

    def update(self, loss: Tensor) -> int:
        """Update, then renew the copies if it is time."""
        lost, self.step = super().update(loss), self.step + 1
        if self.step % self.every == 0:
            states = [value for p in self.parameters for value in self.optimizer.state[p].values()]
            for tensor in [*self.parameters, *(value for value in states if isinstance(value, Tensor))]:
                dist.broadcast(tensor.data, 0)
        return lost


RANK_METHODS: dict[str, Callable[[Task, torch.optim.Optimizer], Any]] = {
    **METHODS,
    "splitter before": SplitBefore,
    "splitter + broadcast": SplitAndRenew,
}


@dataclass(frozen=True)
class RankTrial:
    """What is run.

    Attributes:
        workload: a name of `WORKLOADS`.
        method: a name of `RANK_METHODS`.
        place: a name of `PLACES`.
        fault: a name of `RANK_FAULTS`, or "clean".
        rate: share of the steps that are faulty; 0 where clean.
        seed: of weights, batches and faults.
        ranks: processes; the fault is on the last.
    """

    workload: str
    method: str
    place: str
    fault: str
    rate: float
    seed: int
    ranks: int


class Ranked:
    """A model on ranks, with whatever is to happen to this rank's gradient of the step.

    Args:
        task: its model is wrapped, or sharded in place.
        place: where faults are planted.
    """

    def __init__(self, task: Task, place: str) -> None:
        self.task, self.place = task, place
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        if place == "shard":
            mesh = init_device_mesh("cpu", (self.num_ranks,))
            self.model: nn.Module = fully_shard(task.model, mesh=mesh)
        else:
            self.model = DistributedDataParallel(task.model)
            self.model.register_comm_hook(None, lambda _, bucket: self._average(bucket))
        self.parameters = list(task.model.parameters())
        self._plant: Callable[[Sequence[Tensor]], None] | None = None

    def _average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Plant what is to be planted before the average, then average as DDP does."""
        held = {id(p): gradient for p, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        if len(held) != len(self.parameters):
            raise RuntimeError(f"Ranked: expected all {len(self.parameters)} gradients in one bucket, got {len(held)}.")
        if self.place == "before" and self._plant is not None:
            self._plant([held[id(p)] for p in self.parameters])
        return allreduce_hook(dist.group.WORLD, bucket)

    def backward(self, step: int, fault: Fault | None, seed: int, own: GradientSplitter | None) -> Tensor:
        """Forward and backward on this rank's share of the batch, the fault planted; returns the rank's loss."""
        draw = None if fault is None or self.rank < self.num_ranks - 1 else fault.draw(seed, step)
        plant = None if draw is None else (lambda gradients: fault.on_gradients(gradients, draw))
        self._plant = plant
        batch = tuple(part[self.rank :: self.num_ranks] for part in self.task.batch(step))
        with contextlib.nullcontext() if own is None else self.model.no_sync():
            loss = self.task.loss(self.model, batch)
            torch.autograd.backward(loss)
        gradients = [p.grad for p in self.parameters]
        if own is not None:  # DDP has averaged nothing
            if plant is not None and self.place == "before":
                plant(gradients)
            own.step()
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for g, mean in zip(gradients, (flat / self.num_ranks).split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view_as(g))
        if plant is not None and self.place != "before":
            plant([g.to_local() if self.place == "shard" else g for g in gradients])
        return loss.detach()


def run_on_rank(trial: RankTrial) -> dict[str, Any]:
    """Train and score on this rank; the same row on every rank.

    Returns:
        The trial, "first_loss" and "final_loss" on held-out data, the worst rank's, "dead" (of any rank weights or
        loss are not finite), "stopped", "faults", "steps_lost" and "zeroed_share" of the bins as of one process, the
        worst rank's, "apart" (length of the difference of a rank's weights from the first rank's, over the length of
        these; 0 where all have the same bits), and processor "seconds" of all ranks.
    """
    began = time.process_time()
    workload = WORKLOADS[trial.workload]
    task = workload.build(trial.seed)
    ranked = Ranked(task, trial.place)
    optimizer = workload.optimizer(task)
    settings = type(workload.settings)(**{**asdict(workload.settings), "steps": STEPS})
    schedule = make_schedule(optimizer, settings, warmup=0)
    method = RANK_METHODS[trial.method](task, optimizer)
    fault = RANK_FAULTS.get(trial.fault)
    at = frozenset() if fault is None else faulty_steps(fault, trial.seed, STEPS, trial.rate)
    first_loss, lost = _worst(workload.held_out(task)), 0
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ranked.backward(step, fault if step in at else None, trial.seed, getattr(method, "own", None))
        lost += method.update(loss)
        schedule.step()
        if method.stopped or (step % _LOOK_EVERY == 0 and not method.rolls_back and _worst(_alarm(task.model)) > 0):
            lost += STEPS - step - 1
            break
    final_loss = _worst(workload.held_out(task))
    return {
        **asdict(trial),
        "first_loss": first_loss,
        "final_loss": final_loss,
        "stopped": int(method.stopped),
        "dead": int(_worst(_alarm(task.model)) > 0 or not math.isfinite(final_loss)),
        "faults": len(at),
        "steps": STEPS,
        "steps_lost": int(_worst(min(lost, STEPS))),
        "zeroed_share": _worst(method.zeroed_share),
        "apart": 0.0 if trial.place == "shard" else _worst(_distance(task.model)),
        "seconds": round(_sum(time.process_time() - began), 2),
    }


def _alarm(model: nn.Module) -> float:
    """1 if any of this rank's weights are not finite."""
    pieces = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return float(not all(bool(p.isfinite().all()) for p in pieces))


def _distance(model: nn.Module) -> float:
    """Length of this rank's weights less the first rank's, over the length of these."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()]).double()  # 1e30 has a square
    first = mine.clone()
    dist.broadcast(first, 0)
    return 0.0 if torch.equal(mine, first) else float((mine - first).norm() / first.norm())


def _worst(value: float) -> float:
    """The largest over ranks; nan if it is on any."""
    held = [torch.empty(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(held, torch.tensor([value], dtype=torch.float64))
    return float(torch.cat(held).max())


def _sum(value: float) -> float:
    held = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(held)
    return float(held)
