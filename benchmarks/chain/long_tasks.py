"""Temporal order and adding (Pascanu et al. 2013): SGD, global clip, clip + gain penalty, per-step bounds.

50 tanh units, `smart_tanh` initialisation, SGD at rate 0.01, batch 20, limit 1, penalty weight 2; per-step bounds hold
each step's signal at 0.1. Every method gets the same updates at a length. A run ends when it is solved: less than 1 %
of 500 fresh sequences wrong (adding: off by 0.04 or more), looked at every 200 updates.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.chain.record import Rows
from benchmarks.chain.recurrences import METHODS, Recurrences, method
from gradsplit.workloads.recurrence import (
    ADDING_TOLERANCE,
    SOLVED_ERROR,
    SequenceTask,
    build_adding,
    build_temporal_order,
)

LOOK = 200  # updates between two looks
BUILDERS = {"temporal-order": build_temporal_order, "adding": build_adding}


def loss_gradient(task: str, out: Tensor, y: Tensor) -> Tensor:
    """Gradient (R, B, O) of each run's mean loss at its outputs."""
    if task == "adding":
        return 2 * (out - y[..., None]) / y.shape[1]
    return (out.softmax(-1) - F.one_hot(y, out.shape[-1])) / y.shape[1]


def wrong_share(task: str, out: Tensor, y: Tensor) -> Tensor:
    """Share (R,) of wrong sequences; an output that is not finite is wrong."""
    right = (out[..., 0] - y).abs() < ADDING_TOLERANCE if task == "adding" else out.argmax(-1) == y
    return 1 - (right & out.isfinite().all(-1)).double().mean(1)


def drawn(task: SequenceTask, draws: list[torch.Generator], count: int) -> tuple[Tensor, Tensor]:
    """`count` sequences a run, (T, R, count, I), and their targets (R, count)."""
    parts = [task.sequences(count, draw) for draw in draws]
    return torch.stack([x for x, _ in parts]).permute(2, 0, 1, 3).contiguous(), torch.stack([y for _, y in parts])


def train(task: str, name: str, length: int, seeds: list[int], updates: int, options: Any) -> list[dict[str, Any]]:
    """Runs of all seeds with one method, side by side; ends when all are solved, or after so many updates."""
    data = BUILDERS[task](0, length=length)
    nets = Recurrences([BUILDERS[task](seed, length=length).model for seed in seeds])
    if options.std != 0.01:
        for key in ("w_in", "head.weight"):
            nets.weights[key] *= options.std / 0.01
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    fresh = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
    running, how = list(seeds), method(name, options.penalty)
    best, largest = dict.fromkeys(seeds, 1.0), dict.fromkeys(seeds, 0.0)
    rows = []

    def finish(seed: int, solved: bool, update: int) -> None:
        rows.append({"length": length, "method": name, "updates": updates, "seed": seed, "solved": solved,
                     "after": update, "best_error": best[seed], "largest_norm": largest[seed]})  # fmt: skip

    for look in range(updates // LOOK):
        x, y = drawn(data, draws, LOOK * data.batch_size)
        tops = torch.zeros(len(running))
        for x_now, y_now in zip(x.split(data.batch_size, 2), y.split(data.batch_size, 1), strict=True):
            h = nets.states(x_now)
            grads, norm_R = nets.gradients(x_now, h, loss_gradient(task, nets.outputs(h[-1]), y_now), how)
            tops = torch.maximum(tops, norm_R)
            nets.update(grads, options.rate)
        x, y = drawn(data, fresh, 500)
        wrong = wrong_share(task, nets.outputs(nets.states(x)[-1]), y).tolist()
        going = []
        for i, seed in enumerate(running):
            best[seed], largest[seed] = min(best[seed], wrong[i]), max(largest[seed], float(tops[i]))
            if wrong[i] < SOLVED_ERROR:
                finish(seed, True, (look + 1) * LOOK)
            else:
                going.append(i)
        if len(going) < len(running):
            nets.keep(torch.tensor(going, dtype=torch.long))
            running, draws, fresh = ([values[i] for i in going] for values in (running, draws, fresh))
        if not running:
            return rows
    for seed in running:
        finish(seed, False, updates)
    return rows


def main(arguments: list[str], task: str) -> None:
    parser = argparse.ArgumentParser(prog=f"chain_tasks.py {task}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20])
    parser.add_argument("--updates", type=int, nargs="+", default=[20000], help="one for all lengths, or one for each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--penalty", type=float, default=2.0)
    parser.add_argument("--std", type=float, default=0.01, help="of the input and output weights")
    parser.add_argument("--out", default=f"chain_{task.replace('-', '_')}", help="name of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    numbers = options.updates * (len(options.lengths) if len(options.updates) == 1 else 1)
    command = f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py {task} {' '.join(arguments)}"
    rows = Rows(options.out, command, ("length", "method", "updates", "seed"))
    for length, updates in zip(options.lengths, numbers, strict=True):
        for name in options.methods:
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            todo = [seed for seed in seeds if rows.missing(length, name, updates, seed)]
            for row in train(task, name, length, todo, updates, options) if todo else ():
                rows.add(row)
    facts = {"rate": options.rate, "penalty": options.penalty, "std": options.std}
    print(rows.write(options=facts))
