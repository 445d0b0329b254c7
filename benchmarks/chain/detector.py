"""The two-headed detector: every method on an equal grid of learning rates and strengths, then fresh seeds."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.chain.record import RESULTS, conditions, middle, save
from gradsplit.chain.chain_splitter import ChainSplitter, ModuleLimits, modules_with_parameters
from gradsplit.lab.workloads.detection import build_detection

RATES = {"sgdm": (0.03, 0.1, 0.3), "adamw": (0.003, 0.01, 0.03)}
# strength: limit of the global clip; total of the per-module limits; weight of the box loss
STRENGTHS: dict[str, tuple[float, ...]] = {
    "none": (1.0,),
    "global clip": (0.1, 1.0, 10.0),
    "module limits": (0.3, 1.0, 3.0),
    "fork rule + module limits": (0.3, 1.0, 3.0),
    "loss weight": (0.1, 0.03, 0.01),
    "loss weight + module limits": (0.1, 0.03, 0.01),
    "default": (1.0,),
}
PLACES = {"fork rule + module limits": "forks", "default": "auto"}


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
    total = strength if method in ("module limits", "fork rule + module limits") else 1.0
    chain = ChainSplitter(model, at=PLACES[method], total=total).attach(opt) if method in PLACES else None
    limits = ModuleLimits(modules_with_parameters(model), total)
    for step in range(steps):
        opt.zero_grad()
        loss = task.loss(weighted, task.batch(step))
        if not math.isfinite(float(loss.detach())):
            break
        loss.backward()
        if method == "global clip":
            nn.utils.clip_grad_norm_(model.parameters(), strength)
        elif method in ("module limits", "loss weight + module limits"):
            limits.bound_()
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
    parser.add_argument("--only", nargs="+", choices=STRENGTHS, default=list(STRENGTHS), help="these methods only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    name = f"chain_detector_{options.variant}_{options.optimizer}"
    command = f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py detector --optimizer {options.optimizer}"
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {"grid": [], "fresh": []}
    grid, fresh, earlier = known["grid"], known["fresh"], known.get("earlier", [])
    before, now = known.get("conditions"), conditions()
    if before and any(before[key] != now[key] for key in ("date", "cpu")):
        told = {method for entry in earlier for method in entry["methods"]}
        methods = [method for method in dict.fromkeys(cell["method"] for cell in grid) if method not in told]
        earlier.append({"date": before["date"], "cpu": before["cpu"], "methods": methods})

    def keep() -> Path:
        facts = {key: value for key, value in vars(options).items() if key != "only"}
        return save(name, command, {"options": facts, "earlier": earlier, "grid": grid, "fresh": fresh})

    def scores(method: str, rate: float, strength: float, seed: int) -> dict:
        return train(method, options.optimizer, rate, strength, seed, options.steps, options.variant)

    for method in options.only:
        for rate, strength in itertools.product(RATES[options.optimizer], STRENGTHS[method]):
            cell = {"method": method, "rate": rate, "strength": strength}
            if any(cell.items() <= done.items() for done in grid):
                continue
            cell["scores"] = [scores(method, rate, strength, seed)["score"] for seed in range(options.tuning_seeds)]
            grid.append(cell)
            print(cell, flush=True)
            keep()
    for method in options.only:
        cell = max((cell for cell in grid if cell["method"] == method), key=lambda cell: middle(cell["scores"]))
        for seed in range(100, 100 + options.seeds):
            if any((row["method"], row["seed"]) == (method, seed) for row in fresh):
                continue
            row = {"method": method, "rate": cell["rate"], "strength": cell["strength"], "seed": seed}
            fresh.append({**row, **scores(method, cell["rate"], cell["strength"], seed)})
            print(fresh[-1], flush=True)
            keep()
    print(keep())
