"""The two-headed detector: every method on an equal grid of learning rates and strengths, then fresh seeds."""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.chain.record import middle, save
from gradsplit.chain.module_limits import bound_modules, modules_with_parameters
from gradsplit.chain.splitter import ChainSplitter
from gradsplit.workloads.detection import build_detection

RATES = {"sgdm": (0.03, 0.1, 0.3), "adamw": (0.003, 0.01, 0.03)}
# strength: limit of the global clip; total of the per-module limits; weight of the box loss
STRENGTHS: dict[str, tuple[float, ...]] = {
    "none": (1.0,),
    "global clip": (0.1, 1.0, 10.0),
    "module limits": (0.3, 1.0, 3.0),
    "fork rule + module limits": (0.3, 1.0, 3.0),
    "loss weight": (0.1, 0.03, 0.01),
    "loss weight + module limits": (0.1, 0.03, 0.01),
}


class WeightedBoxes(nn.Module):
    """A detector whose box loss counts `weight` times: the gradient of its raw boxes is scaled, nothing else."""

    def __init__(self, model: nn.Module, weight: float | Callable[[], float]) -> None:
        super().__init__()
        self.model, self.weight = model, weight

    def forward(self, images: Tensor) -> Any:
        """As the detector's; the box head's output comes first."""
        raw, *others = self.model(images)
        weight = self.weight() if callable(self.weight) else self.weight
        if raw.requires_grad:
            raw = raw * weight + raw.detach() * (1 - weight)
        return raw, *others


def make_optimizer(name: str, parameters: Any, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW with torch's defaults."""
    if name == "sgdm":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=rate)


def train(method: str, optimizer: str, rate: float, strength: float, seed: int, steps: int, variant: str) -> dict:
    """One run; returns the scores of the last model."""
    task = build_detection(seed, variant=variant)
    model = task.model
    opt = make_optimizer(optimizer, model.parameters(), rate)
    weighted = WeightedBoxes(model, strength if method.startswith("loss weight") else 1.0)
    owners = modules_with_parameters(model)
    total = strength if method == "module limits" or method.startswith("fork") else 1.0
    chain = ChainSplitter(model, at="forks", total=total).attach(opt) if method.startswith("fork") else None
    for step in range(steps):
        opt.zero_grad()
        loss = task.loss(weighted, task.batch(step))
        if not math.isfinite(float(loss.detach())):
            break
        loss.backward()
        if method == "global clip":
            nn.utils.clip_grad_norm_(model.parameters(), strength)
        elif method in ("module limits", "loss weight + module limits"):
            bound_modules(owners.values(), total)
        opt.step()
    if chain is not None:
        chain.remove()
    return task.evaluate(model)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py detector")
    parser.add_argument("--optimizer", choices=sorted(RATES), default="sgdm")
    parser.add_argument("--variant", default="two-tower")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--grid", help="take the tuning grid from the printed output of an earlier run")
    parser.add_argument("--only", nargs="+", help="fresh seeds for these methods only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began, grid, fresh = time.time(), [], []
    if options.grid:
        lines = Path(options.grid).read_text().splitlines()
        grid = [ast.literal_eval(line) for line in lines if line.startswith("{'method'")]
    for method, strengths in STRENGTHS.items() if not options.grid else ():
        for rate, strength in itertools.product(RATES[options.optimizer], strengths):
            scores = [
                train(method, options.optimizer, rate, strength, seed, options.steps, options.variant)["score"]
                for seed in range(options.tuning_seeds)
            ]
            grid.append({"method": method, "rate": rate, "strength": strength, "scores": scores})
            print(grid[-1], flush=True)
    chosen = {
        method: max((cell for cell in grid if cell["method"] == method), key=lambda cell: middle(cell["scores"]))
        for method in STRENGTHS
    }
    untuned = max(
        (c for c in grid if c["method"] == "fork rule + module limits" and c["strength"] == 1.0),
        key=lambda cell: middle(cell["scores"]),
    )
    chosen["fork rule + module limits, total 1"] = {**untuned, "method": "fork rule + module limits, total 1"}
    name = f"chain_detector_{options.variant}_{options.optimizer}"
    command = f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py detector --optimizer {options.optimizer}"

    def keep() -> Path:
        facts = {
            "seconds": time.time() - began,
            "options": {**vars(options), "grid": bool(options.grid)},
            "grid": grid,
            "fresh": fresh,
        }
        return save(name, command, facts)

    keep()
    for label, cell in chosen.items():
        if options.only and label not in options.only:
            continue
        for seed in range(100, 100 + options.seeds):
            scores = train(
                label, options.optimizer, cell["rate"], cell["strength"], seed, options.steps, options.variant
            )
            fresh.append({"method": label, "rate": cell["rate"], "strength": cell["strength"], "seed": seed, **scores})
        values = [row["score"] for row in fresh if row["method"] == label]
        print(
            f"{label:36s} lr {cell['rate']:<6} strength {cell['strength']:<5} "
            f"median {middle(values):.3f} [{min(values):.3f} to {max(values):.3f}]",
            flush=True,
        )
        keep()
    print(keep())
