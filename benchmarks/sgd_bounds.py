"""Bounds in front of SGD that were tried beside the default: do they cost a clean run less, and do they hold hot nets?

    OMP_NUM_THREADS=1 python benchmarks/sgd_bounds.py         # 25 minutes on one core; goes on where it stopped
    OMP_NUM_THREADS=1 python benchmarks/sgd_bounds.py --rules "gate, long memory" --tasks "hot stack"

Appends to benchmarks/results/sgd-bounds.jsonl: one row a run. Each rule lets every row move by a share of its length
(at least 1 for rows of a matrix), at most. The rules differ in the share:

    3 %                   the default
    30 %                  ten times that, and the collective rule
    gate, long memory     30 % while the median row would move by less than 3 %, else 3 %. What counts is the larger of
                          that median now and its recent maximum, which falls by 2 % a step and rises by 30 % at most
    gate, short memory    the same with the geometric mean of about twenty steps in the place of the recent maximum
    credit                3 % on average: what a row leaves unused it may use later, one length in all, 30 % a step
    vectors 30 %          30 % for biases and gains, which start at 0 or move apart, and 3 % for rows of matrices
    agreement             3 % where a row's gradient has nothing to do with its momentum, and up to 30 % where the
                          cosine of the two, over about ten steps, is .25 or more; with the collective rule
    none                  no bound, beside the others on longer runs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import benchmarks.any_optimizer as small
import gradsplit as gs
from gradsplit.collective import Recent
from gradsplit.lab.methods import Method
from gradsplit.lab.optimizers import Settings
from gradsplit.lab.registry import workload
from gradsplit.lab.train import train

OUT = Path(__file__).parent / "results" / "sgd-bounds.jsonl"
TIGHT, LOOSE = 0.03, 0.3


class Bound:
    """Lets each row move by a share of its length; a subclass says which share."""

    tally = None
    collective = False

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        splitter = gs.GradientSplitter(model, budget=gs.RelativeStep(), optimizer=optimizer)
        self.parameters, self.kernel, self.optimizer = splitter.parameters, splitter.kernel, optimizer
        plan = splitter.plan
        numel, num_rows = (torch.tensor(np.asarray(x)).double() for x in (plan.numel_B, plan.num_rows_B))
        self.least = torch.maximum(num_rows.sqrt(), 0.01 * numel.sqrt())
        self.recent = Recent(torch.zeros_like(numel)) if self.collective else None
        self.num_rows, self.top = num_rows, 0.0
        self.start()

    def start(self) -> None:
        """Make what is remembered between steps."""

    def share(self, wanted: Tensor) -> Any:
        """The share that each row may move by, from the share that it would move by at the largest rate, (B,)."""
        return TIGHT

    @torch.no_grad()
    def bound(self) -> None:
        """Act on the gradients of this step."""
        gradients = [p.grad for p in self.parameters]
        squares = self.kernel.squares(gradients).double()
        lengths = torch.maximum(self.kernel.squares(self.parameters).double().sqrt(), self.least)
        factor = torch.ones(()) if self.recent is None else self.recent.factor(squares)
        group = self.optimizer.param_groups[0]
        self.top = max(self.top, group["lr"])
        finite = squares.isfinite()
        wanted = squares.sqrt() * factor * self.top / (1 - group["momentum"]) / lengths
        allowed = self.share(torch.where(finite, wanted, torch.nan))
        scale = factor * torch.where(finite, torch.clamp(allowed / wanted, max=1.0).nan_to_num(1.0, 1.0), 0.0)
        self.kernel.scale_(gradients, scale, ~finite)


class Loose(Bound):
    """Ten times the default, and the collective rule."""

    collective = True

    def share(self, wanted: Tensor) -> Any:  # noqa: D102
        return LOOSE


class Gate(Bound):
    """Loose while the median row would move by less than the tight share."""

    def start(self) -> None:  # noqa: D102
        self.recent_median = 0.0

    def share(self, wanted: Tensor) -> Any:  # noqa: D102
        median = float(torch.quantile(wanted[wanted > 0], 0.5)) if bool((wanted > 0).any()) else 0.0
        return TIGHT if max(self.remembered(median), median) > TIGHT else LOOSE

    def remembered(self, median: float) -> float:
        """The recent maximum."""
        risen = min(median, 1.3 * self.recent_median) if self.recent_median > 0 else median
        self.recent_median = max(0.98 * self.recent_median, risen)
        return self.recent_median


class ShortGate(Gate):
    """The same with a mean of about twenty steps, which begins as if the median row moved by its own length."""

    def remembered(self, median: float) -> float:  # noqa: D102
        self.recent_median = 0.95 * self.recent_median + 0.05 * math.log(max(median, 1e-12))
        return math.exp(self.recent_median)


class Credit(Bound):
    """Tight on average; what a row leaves unused is its credit."""

    def start(self) -> None:  # noqa: D102
        self.credit = torch.zeros_like(self.least)

    def share(self, wanted: Tensor) -> Any:  # noqa: D102
        allowed = torch.clamp(TIGHT + self.credit, max=LOOSE)
        self.credit = torch.clamp(self.credit + TIGHT - torch.minimum(wanted.nan_to_num(0.0), allowed), 0.0, 1.0)
        return allowed


class Vectors(Bound):
    """Loose for biases and gains alone."""

    def start(self) -> None:  # noqa: D102
        self.is_vector = self.num_rows == 0

    def share(self, wanted: Tensor) -> Any:  # noqa: D102
        return torch.where(self.is_vector, LOOSE, TIGHT)


class Agreement(Bound):
    """Loose where a row's gradient goes on in the direction of its momentum."""

    collective = True

    def start(self) -> None:  # noqa: D102
        self.agreement = torch.zeros_like(self.least)

    def bound(self) -> None:  # noqa: D102
        cosines = []
        for p in self.parameters:
            rows = p.shape[0] if p.dim() > 1 else 1
            momentum = self.optimizer.state.get(p, {}).get("momentum_buffer", torch.zeros_like(p))
            pair = p.grad.reshape(rows, -1), momentum.reshape(rows, -1)
            cosines.append(torch.nn.functional.cosine_similarity(*pair, dim=1, eps=1e-30))
        self.agreement = 0.9 * self.agreement + 0.1 * torch.cat(cosines).double().nan_to_num(0.0)
        super().bound()

    def share(self, wanted: Tensor) -> Any:  # noqa: D102
        return TIGHT * (LOOSE / TIGHT) ** torch.clamp(self.agreement / 0.25, 0.0, 1.0)


class Free(Bound):
    """No bound."""

    def bound(self) -> None:  # noqa: D102
        return None


RULES = {
    "3 %": Bound,
    "30 %": Loose,
    "gate, long memory": Gate,
    "gate, short memory": ShortGate,
    "credit": Credit,
    "vectors 30 %": Vectors,
    "agreement": Agreement,
    "none": Free,
}
LENGTHS = (800, 2000)
"""Steps of the longer clean runs."""
TASKS: dict[str, tuple[str, tuple[float, ...], tuple[int, ...], dict[str, Any]]] = {
    "text, clean": ("text", (0.3,), (0, 1, 2, 3, 4), {}),
    "detection, clean": ("detection", (0.03,), (0, 1, 2, 3, 4), {}),
    "exploding detection": ("detection", (0.03, 0.1, 0.3), (1000, 1001), {}),
    "hot stack": ("residual-stack", (0.1, 1.0), (1000,), {}),
    "cool stack": ("residual-stack", (0.1, 0.3), (1000,), {"gain": 0.5}),
    "GPT": ("gpt", (0.1, 0.3, 1.0), (1000,), {}),
    **{f"text, {steps} steps, clean": ("text", (0.3,), (0, 1, 2), {"steps": steps}) for steps in LENGTHS},
    **{f"detection, {steps} steps, clean": ("detection", (0.03,), (0, 1, 2), {"steps": steps}) for steps in LENGTHS},
}
"""Title -> workload, learning rates, seeds and options. The clean ones are those of `any_optimizer`, 200 steps or more.
"""


def run(rule: str, title: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once and return one row."""
    name, _, _, options = TASKS[title]
    kind = RULES[rule]
    if title.endswith("clean"):

        def control(task: Any, optimizers: small.Made) -> small.Bound:
            bound = kind(task.model, optimizers[0])
            return lambda: bound.bound() is None

        small.CONTROLS[rule] = control
        score = small.run(name, "SGD", rule, "clean", 0.0, seed, lr, **options)["final_loss"]
    else:
        row = workload(name)
        method = Method(rule, rule, lambda task, optimizer, *_: kind(task.model, optimizer))
        settings = Settings(500 if name == "gpt" else row.steps, "sgdm")
        result = train(row.build(seed=seed, **options), method, lr=lr, settings=settings)
        score = math.nan if result.diverged else float(result.metrics[row.metric])
    return {
        "rule": rule,
        "task": title,
        "lr": lr,
        "seed": seed,
        "score": None if math.isnan(score) else round(score, 5),
    }


def main() -> None:
    """Run what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.out.read_text("utf8").splitlines()] if options.out.is_file() else []
    done = {(row["rule"], row["task"], row["lr"], row["seed"]) for row in rows}
    for title, rule in product(options.tasks, options.rules):
        for lr, seed in product(*TASKS[title][1:3]):
            if (rule, title, lr, seed) not in done:
                row = run(rule, title, lr, seed)
                print(row, flush=True)
                with options.out.open("a", encoding="utf8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
