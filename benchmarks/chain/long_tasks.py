"""Temporal order and adding (Pascanu et al. 2013): SGD, global clip, clip + gain penalty, per-step bounds.

50 tanh units, `smart_tanh` initialisation, SGD at rate 0.01, batch 20, limit 1, penalty weight 2; per-step bounds hold
each step's signal at 0.1. Every method gets the same updates at a length. A run ends when it is solved: less than 1 %
of 500 fresh sequences wrong (adding: a squared error above 0.04, as in the authors' code), looked at every 200 updates.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.chain.record import Rows
from benchmarks.chain.recurrences import METHODS, Recurrences, method
from gradsplit.lab.workloads.recurrence import SOLVED_ERROR, SequenceTask, build_adding, build_temporal_order

ADDING_TOLERANCE = 0.04  # of the squared error; the workload "adding" has the stricter 0.04 of the error itself
LOOK = 200  # updates between two looks
BUILDERS = {"temporal-order": build_temporal_order, "adding": build_adding}


def loss_gradient(task: str, out: Tensor, y: Tensor) -> Tensor:
    """Gradient (R, B, O) of each run's mean loss at its outputs."""
    if task == "adding":
        return 2 * (out - y[..., None]) / y.shape[1]
    return (out.softmax(-1) - F.one_hot(y, out.shape[-1])) / y.shape[1]


def wrong_share(task: str, out: Tensor, y: Tensor) -> Tensor:
    """Share (R,) of wrong sequences; an output that is not finite is wrong."""
    right = (out[..., 0] - y).square() <= ADDING_TOLERANCE if task == "adding" else out.argmax(-1) == y
    return 1 - (right & out.isfinite().all(-1)).double().mean(1)


def drawn(task: SequenceTask, draws: list[torch.Generator], count: int) -> tuple[Tensor, Tensor]:
    """`count` sequences a run, (T, R, count, I), and their targets (R, count)."""
    parts = [task.sequences(count, draw) for draw in draws]
    return torch.stack([x for x, _ in parts]).permute(2, 0, 1, 3).contiguous(), torch.stack([y for _, y in parts])


class Group:
    """All seeds of one task, length and method, side by side; kept in a file after every look.

    Args:
        task: "temporal-order" or "adding".
        length: of the sequences.
        name: of the method.
        seeds: of weights and sequences.
        options: the rate, the penalty's weight and the folder of the file.
    """

    def __init__(self, task: str, length: int, name: str, seeds: list[int], options: Any) -> None:
        self.task, self.length, self.name, self.rate = task, length, name, options.rate
        self.how = method(name, options.penalty)
        self.data = BUILDERS[task](0, length=length)
        self.nets = Recurrences([BUILDERS[task](seed, length=length).model for seed in seeds])
        self.draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.fresh = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
        self.running, self.update = list(seeds), 0
        self.rows = {seed: {"seed": seed, "solved": False, "best_error": 1.0, "largest_norm": 0.0} for seed in seeds}
        marks = f"{task} {length} {name} {seeds} {options.rate:g} {options.penalty:g}"
        self.path = Path(options.states) / f"{marks.replace(' ', '_')}.pt"
        if self.path.exists():
            kept = torch.load(self.path)
            self.nets.weights, self.running, self.update, self.rows = kept["state"]
            for draw, at in zip(self.draws + self.fresh, kept["draws"], strict=True):
                draw.set_state(at)

    def keep(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = (self.nets.weights, self.running, self.update, self.rows)
        part = self.path.with_suffix(".part")
        torch.save({"state": state, "draws": [draw.get_state() for draw in self.draws + self.fresh]}, part)
        part.replace(self.path)

    def train(self, updates: int) -> None:
        """Go on until every run is solved, or has had so many updates."""
        while self.running and self.update < updates:
            self._look()
            self.keep()

    def _look(self) -> None:
        """As many updates as lie between two looks, then the share of fresh sequences that are wrong."""
        batch, seeds = self.data.batch_size, list(self.rows)
        draws, fresh = ([of[seeds.index(seed)] for seed in self.running] for of in (self.draws, self.fresh))
        x, y = drawn(self.data, draws, LOOK * batch)
        largest_R = torch.zeros(len(self.running))
        for x_now, y_now in zip(x.split(batch, 2), y.split(batch, 1), strict=True):
            h = self.nets.states(x_now)
            d_out = loss_gradient(self.task, self.nets.outputs(h[-1]), y_now)
            grads, norm_R = self.nets.gradients(x_now, h, d_out, self.how)
            largest_R = torch.maximum(largest_R, norm_R)
            self.nets.update(grads, self.rate)
        self.update += LOOK
        x, y = drawn(self.data, fresh, 500)
        wrong_R = wrong_share(self.task, self.nets.outputs(self.nets.states(x)[-1]), y).tolist()
        for seed, wrong, largest in zip(self.running, wrong_R, largest_R.tolist(), strict=True):
            row = self.rows[seed]
            row["best_error"], row["largest_norm"] = min(row["best_error"], wrong), max(row["largest_norm"], largest)
            row["after"], row["solved"] = self.update, wrong < SOLVED_ERROR
        going = [i for i, seed in enumerate(self.running) if not self.rows[seed]["solved"]]
        if len(going) < len(self.running):
            self.nets.keep(torch.tensor(going, dtype=torch.long))
            self.running = [self.running[i] for i in going]


def main(arguments: list[str], task: str) -> None:
    parser = argparse.ArgumentParser(prog=f"chain_tasks.py {task}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20])
    parser.add_argument("--updates", type=int, nargs="+", default=[20000], help="one for all lengths, or one for each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--penalty", type=float, default=2.0)
    parser.add_argument("--states", default="build/long_tasks", help="folder of what is needed to go on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    numbers = options.updates * (len(options.lengths) if len(options.updates) == 1 else 1)
    command = f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py {task} {' '.join(arguments)}"
    rows = Rows(f"chain_{task.replace('-', '_')}", command, ("length", "method", "seed"))
    for length, updates in zip(options.lengths, numbers, strict=True):
        for name in options.methods:
            seeds = list(range(options.seeds))
            known = [rows.by_key.get((length, name, seed)) for seed in seeds]
            if all(row is not None and (row["solved"] or row["updates"] >= updates) for row in known):
                continue
            group = Group(task, length, name, seeds, options)
            group.train(updates)
            for row in group.rows.values():
                rows.add({"length": length, "method": name, "updates": updates, **row})
    print(rows.write(options={"rate": options.rate, "penalty": options.penalty}))
