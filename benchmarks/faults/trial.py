"""One run: a workload trained by a method under a fault, and the loss it ends with."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.faults.events import FAULTS, Fault, faulty_steps
from benchmarks.faults.methods import METHODS, WITH_HISTORY
from benchmarks.faults.workloads import WORKLOADS
from gradsplit.lab.optimizers import make_schedule

__all__ = ["CLEAN", "Trial", "run"]

CLEAN = "clean"
_LOOK_EVERY = 10  # steps between two looks at whether the weights are finite


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        workload: a name of `WORKLOADS`.
        method: a name of `METHODS`, or of `WITH_HISTORY`.
        fault: a name of `FAULTS`, or "clean".
        rate: share of the steps that are faulty; 0 where clean.
        seed: of weights, batches and faults.
    """

    workload: str
    method: str
    fault: str
    rate: float
    seed: int


def run(trial: Trial) -> dict[str, Any]:
    """Train and score; one row of the raw file.

    Returns:
        The trial, "first_loss" and "final_loss" on held-out data, "dead" (weights or final loss not finite),
        "stopped" (a guard had no rollback left; the loss is that of its last snapshot),
        "faults" that were met, "steps_lost" (no gradient came through, the update was undone, or the weights were no
        longer finite), "zeroed_share" of the bins, and processor "seconds".
    """
    began = time.process_time()
    workload = WORKLOADS[trial.workload]
    task = workload.build(trial.seed)
    optimizer = workload.optimizer(task)
    schedule = make_schedule(optimizer, workload.settings, warmup=0)
    method = (METHODS | WITH_HISTORY)[trial.method](task, optimizer)
    fault = FAULTS.get(trial.fault)
    steps = workload.settings.steps
    at = frozenset() if fault is None else faulty_steps(fault, trial.seed, steps, trial.rate)
    first_loss, lost, met = workload.held_out(task), 0, 0
    for step in range(steps):
        acting = fault if step in at else None
        met += acting is not None
        loss = _backward(task, optimizer, step, acting, trial.seed)
        lost += method.update(loss)
        schedule.step()
        broken = step % _LOOK_EVERY == 0 and not method.rolls_back and not _finite(task.model)
        if broken or method.stopped:
            lost += steps - step - 1
            break
    final_loss = workload.held_out(task)
    return {
        **asdict(trial),
        "first_loss": first_loss,
        "final_loss": final_loss,
        "stopped": int(method.stopped),
        "dead": int(not (_finite(task.model) and math.isfinite(final_loss))),
        "faults": met,
        "steps": steps,
        "steps_lost": min(lost, steps),
        "zeroed_share": method.zeroed_share,
        "seconds": round(time.process_time() - began, 2),
    }


def _backward(task: Any, optimizer: torch.optim.Optimizer, step: int, fault: Fault | None, seed: int) -> Tensor:
    """Forward and backward of one step, with the fault if any; returns the loss."""
    batch, factor = task.batch(step), 1.0
    draw = None if fault is None else fault.draw(seed, step)
    if fault is not None and draw is not None and fault.on_batch is not None:
        batch, factor = fault.on_batch(batch, draw)
    optimizer.zero_grad()
    loss = task.loss(task.model, batch) * factor
    torch.autograd.backward(loss)
    if fault is not None and draw is not None and fault.on_gradients is not None:
        fault.on_gradients([p.grad for p in task.model.parameters() if p.grad is not None], draw)
    if fault is not None and draw is not None and fault.on_state is not None:
        held = [value for p in task.model.parameters() for value in optimizer.state[p].values()]
        fault.on_state([value for value in held if isinstance(value, Tensor) and value.dim() > 0], draw)
    return loss.detach()


def _finite(model: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())
