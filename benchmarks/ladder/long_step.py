"""Does `diagnose` call a step too long where training bears it? Healthy nets at usual rates, and at 10 and 100 times.

The nets are those of benchmarks/attribution.py in its sound initialisations. For each rate: whether there is a finding
"long step", and, as the truth beside it, whether ten steps of the same optimizer on the same batch end below the loss
they began with, and below half of what the best of the three rates gains. For each finding: the radius at several
orders. And seconds of CPU with and without `ladder=True`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.chain.fault_models import MODELS, reinitialise
from benchmarks.ladder.raw import load, save
from gradsplit.diagnose.diagnosis import diagnose
from gradsplit.diagnose.step_trial import StepTrial

INITS = ("default", "xavier", "kaiming", "orthogonal", "default")
FACTORS = (1.0, 10.0, 100.0)
ORDERS = (12, 16, 20, 24, 30, 60)
STEPS = 10
OPTIMIZERS: dict[str, tuple[float, Callable[..., torch.optim.Optimizer]]] = {
    "SGD": (0.1, torch.optim.SGD),
    "SGD, momentum 0.9": (0.01, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)),
    "AdamW": (1e-3, torch.optim.AdamW),
}


def net(name: str, seed: int) -> tuple[nn.Module, Any, Any]:
    """One healthy net, the same at every call."""
    torch.manual_seed(seed)
    model, loss_fn, batch = MODELS[name](seed)
    reinitialise(model, INITS[seed % len(INITS)], name)
    return model, loss_fn, batch


def trained(name: str, seed: int, make: Callable[..., torch.optim.Optimizer], rate: float) -> tuple[float, float]:
    """The loss before and after some steps on one batch."""
    model, loss_fn, batch = net(name, seed)
    optimizer = make(model.parameters(), lr=rate)
    losses = []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1] if math.isfinite(losses[-1]) else math.inf


def case(name: str, seed: int, optimizer_name: str, factor: float) -> dict[str, Any]:
    """One diagnosis and what training does."""
    rate, make = OPTIMIZERS[optimizer_name]
    model, loss_fn, batch = net(name, seed)
    optimizer = make(model.parameters(), lr=rate * factor)
    import torch.fx.experimental.proxy_tensor  # noqa: F401 - seconds, once a process: no part of a diagnosis

    diagnose(model, loss_fn, batch, optimizer)  # warm
    start = time.process_time()
    diagnose(model, loss_fn, batch, optimizer)
    middle = time.process_time()
    result = diagnose(model, loss_fn, batch, optimizer, ladder=True)
    end = time.process_time()
    found = [finding for finding in result.findings if finding.kind == "long step"]
    before, after = trained(name, seed, make, rate * factor)
    row: dict[str, Any] = {
        "model": name, "seed": seed, "optimizer": optimizer_name, "rate": rate * factor, "factor": factor,
        "findings": [finding.sentence for finding in found],
        "notes": list(result.notes), "before": before, "after": str(after) if math.isinf(after) else after,
        "cpu_seconds": [middle - start, end - middle],
    }  # fmt: skip
    if found:
        model, loss_fn, batch = net(name, seed)
        trial = StepTrial.of(model, loss_fn, batch, make(model.parameters(), lr=rate * factor))
        parts = [trial.whole(tensor) for tensor in trial.update.direction]
        worst = max((part for part in parts if trial.guilty(part)), key=trial.promise)
        row["radius"] = {str(order): float(trial.ladder([worst], order).radius_B[0]) for order in ORDERS}
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts a factor, and how far the radius at each order is from that at the highest."""
    best: dict[tuple[str, int, str], float] = {}
    for row in rows:
        key = (row["model"], row["seed"], row["optimizer"])
        best[key] = max(best.get(key, 0.0), row["before"] - float(row["after"]))
    table = []
    for optimizer in OPTIMIZERS:
        for factor in sorted({row["factor"] for row in rows}):
            chosen = [row for row in rows if (row["factor"], row["optimizer"]) == (factor, optimizer)]
            if not chosen:
                continue
            cells = {"optimizer": optimizer, "rate": chosen[0]["rate"], "n": len(chosen)}
            for found in (True, False):
                some = [row for row in chosen if bool(row["findings"]) == found]
                gains = [row["before"] - float(row["after"]) for row in some]
                poor = sum(
                    gain < 0.5 * best[row["model"], row["seed"], row["optimizer"]]
                    for gain, row in zip(gains, some, strict=True)
                )
                cells["found" if found else "silent"] = {"n": len(some), "poor": poor, "up": sum(g <= 0 for g in gains)}
            table.append(cells)
    ratios = {
        str(order): [
            math.log10(row["radius"][str(order)] / row["radius"][str(ORDERS[-1])]) for row in rows if "radius" in row
        ]
        for order in ORDERS[:-1]
    }
    cost = {
        name: [statistics.median(row["cpu_seconds"][i] for row in rows if row["model"] == name) for i in (0, 1)]
        for name in dict.fromkeys(row["model"] for row in rows)
    }
    return {
        "table": table,
        "orders": {
            order: {
                "n": len(logs),
                "median": 10 ** statistics.median(map(abs, logs)),
                "worst": 10 ** max(map(abs, logs)),
            }
            for order, logs in ratios.items()
            if logs
        },
        "cpu_seconds": cost,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--healthy", type=int, default=5, help="nets a model at the usual rate")
    parser.add_argument("--raised", type=int, default=1, help="nets a model at 10 and 100 times that rate")
    parser.add_argument("--offset", type=int, default=100, help="first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many; a second run goes on")
    options = parser.parse_args(arguments)
    cases = [
        (name, seed, optimizer, factor)
        for factor in FACTORS
        for name in MODELS
        for optimizer in OPTIMIZERS
        for seed in range(options.offset, options.offset + (options.healthy if factor == 1.0 else options.raised))
    ]
    rows = load("long-step").get("rows", [])  # a run that was stopped goes on
    known = {(row["model"], row["seed"], row["optimizer"], row["factor"]) for row in rows}
    waiting = [key for key in cases if key not in known]
    end = time.monotonic() + options.seconds
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, initializer=_alone) as pool:
        for row in pool.imap_unordered(_case, waiting):
            rows.append(row)
            rows.sort(key=_place)
            save("long-step", {**summary(rows), "rows": rows})
            told = [row[key] for key in ("model", "optimizer", "rate", "findings")]
            print(len(rows), "of", len(cases), *told, flush=True)
            if time.monotonic() > end:
                break


def _alone() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _place(row: dict[str, Any]) -> tuple[float, int, int, int]:
    return row["factor"], list(MODELS).index(row["model"]), list(OPTIMIZERS).index(row["optimizer"]), row["seed"]


def _case(key: tuple[str, int, str, float]) -> dict[str, Any]:
    return case(*key)
