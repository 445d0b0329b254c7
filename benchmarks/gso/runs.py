"""Runs the groups of jobs that are missing, one line per run, and shows what is done."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.gso.plan import GROUPS as TRIALS
from benchmarks.gso.plan import Job
from benchmarks.gso.proof import PROOF
from benchmarks.gso.reference import Collective, GSOReference, output_layers
from benchmarks.gso.tasks import build, evidence, faulty, inject, tasks
from gradsplit.series import DEEP

RESULTS = Path(__file__).parents[1] / "results" / "gso"
RUNS = RESULTS / "runs.jsonl"
DECAY, CLIP = 0.01, 1.0
GROUPS = {**TRIALS, **PROOF}


# ---- methods: (optimizers, what stands before them, steps of warm-up in tenths, own schedule)


class Prepared:
    """What one run needs beside its task."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], before: Callable[[], Any], warmup: bool) -> None:
        self.optimizers, self.before, self.warmup = optimizers, before, warmup
        self.own_schedule = False
        self.collective: Collective | None = None


def _gso(
    task: tasks.Task, lr: float, steps: int, median: str | None = None, rule: str = "recent", **options: Any
) -> Prepared:
    if options.pop("free_outputs", False):
        options["free"] = _outputs(task)
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    limit = options.pop("collective_limit", 5.0 if rule == "recent" else 3.0)
    made = Prepared([GSOReference(task.model, lr, **options)], lambda: None, warmup=False)
    if median is not None:
        made.collective = Collective(
            [p for p in task.model.parameters() if p.requires_grad],
            limit=limit,
            median=median,
            rule=rule,
        )
        made.before = made.collective
    return made


def _shipped(task: tasks.Task, lr: float, steps: int, **options: Any) -> Prepared:
    """`gradsplit.GSO` as it comes; the schedule is the driver's, so that every method has the same."""
    from gradsplit import GSO

    if "direction" in options:  # a mapping, which a job holds as pairs
        options["direction"] = dict(options["direction"])
    return Prepared([GSO(task.model, lr, **options)], lambda: None, warmup=False)


def _outputs(task: tasks.Task) -> set[int]:
    found = task.model(task.batch(0)[0])
    parts = found if isinstance(found, tuple) else (found,)
    return set().union(*(output_layers(task.model, part) for part in parts))


def _clip(model: nn.Module, wide: bool = False) -> Callable[[], Any]:
    """torch's clip; `wide`: its norm in float64, since in float32 that of a very large gradient is infinite."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not wide:
        return partial(nn.utils.clip_grad_norm_, trained, CLIP)

    def clip() -> None:
        grads = [p.grad for p in trained if p.grad is not None]
        norm = torch.stack([grad.double().norm() for grad in grads]).norm()
        for grad in grads:
            grad.copy_(grad.double() * (CLIP / (norm + 1e-6)).clamp(max=1.0))

    return clip


def _adamw(task: tasks.Task, lr: float, steps: int, decay: float = DECAY, wide: bool = False) -> Prepared:
    trained = [p for p in task.model.parameters() if p.requires_grad]
    made = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=decay)
    return Prepared([made], _clip(task.model, wide), warmup=True)


def _muon(
    task: tasks.Task, lr: float, steps: int, adam: float = 3e-3, decay: float = DECAY, wide: bool = False
) -> Prepared:
    """torch.optim.Muon on the hidden matrices, AdamW on embeddings, output layers and vectors.

    torch's Muon takes matrices only. A hidden convolution is handed to it as its matrix (out, in x kernel), which
    shares the memory of the weight.
    """
    outputs = _outputs(task)
    tables = {id(m.weight) for m in task.model.modules() if isinstance(m, nn.Embedding)}
    kernels = {id(m.weight) for m in task.model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    trained = [p for p in task.model.parameters() if p.requires_grad]
    hidden = [p for p in trained if (p.ndim == 2 or id(p) in kernels) and id(p) not in outputs | tables]
    chosen = {id(p) for p in hidden}
    rest = [p for p in trained if id(p) not in chosen]
    matrices = [nn.Parameter(p.detach().view(len(p), -1)) if id(p) in kernels else p for p in hidden]
    muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=decay)
    adamw = torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.99), weight_decay=decay)
    clip = _clip(task.model, wide)

    def before() -> None:
        clip()
        for p, matrix in zip(hidden, matrices, strict=True):
            if matrix is not p:
                matrix.grad, p.grad = p.grad.view(len(p), -1), None

    return Prepared([muon, adamw], before, warmup=True)


def _schedulefree(task: tasks.Task, lr: float, steps: int) -> Prepared:
    from schedulefree import AdamWScheduleFree

    trained = [p for p in task.model.parameters() if p.requires_grad]
    made = AdamWScheduleFree(trained, lr=lr, betas=(0.9, 0.99), weight_decay=DECAY, warmup_steps=steps // 10)
    prepared = Prepared([made], lambda: None, warmup=False)
    prepared.own_schedule = True
    return prepared


def _soap(task: tasks.Task, lr: float, steps: int, decay: float = DECAY, wide: bool = False) -> Prepared:
    from pytorch_optimizer import SOAP

    trained = [p for p in task.model.parameters() if p.requires_grad]
    return Prepared([SOAP(trained, lr=lr, weight_decay=decay)], _clip(task.model, wide), warmup=True)


def _lamb(task: tasks.Task, lr: float, steps: int) -> Prepared:
    from pytorch_optimizer import Lamb

    trained = [p for p in task.model.parameters() if p.requires_grad]
    return Prepared([Lamb(trained, lr=lr, betas=(0.9, 0.99), weight_decay=DECAY)], lambda: None, warmup=True)


def _prodigy(task: tasks.Task, lr: float, steps: int) -> Prepared:
    import contextlib
    import io

    from prodigyopt import Prodigy

    trained = [p for p in task.model.parameters() if p.requires_grad]
    with contextlib.redirect_stdout(io.StringIO()):
        made = Prodigy(trained, lr=lr, betas=(0.9, 0.99), weight_decay=DECAY)
    return Prepared([made], lambda: None, warmup=False)


def _sgdm(task: tasks.Task, lr: float, steps: int, clip: float = CLIP) -> Prepared:
    made = torch.optim.SGD(task.model.parameters(), lr=lr, momentum=0.9)
    return Prepared([made], partial(nn.utils.clip_grad_norm_, list(task.model.parameters()), clip), warmup=False)


def _split(task: tasks.Task, lr: float, steps: int) -> Prepared:
    """The project's splitter at its default, in front of SGD with momentum."""
    from gradsplit import GradientSplitter

    made = torch.optim.SGD(task.model.parameters(), lr=lr, momentum=0.9)
    return Prepared([made], GradientSplitter(task.model, optimizer=made).step, warmup=False)


METHODS: dict[str, Callable[..., Prepared]] = {
    "gso": _shipped,
    "reference": _gso,
    "adamw": _adamw,
    "muon": _muon,
    "schedulefree": _schedulefree,
    "soap": _soap,
    "lamb": _lamb,
    "prodigy": _prodigy,
    "sgdm": _sgdm,
    "split": _split,
}


# ---- one run


def factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The rate over the rate asked for: a linear rise over `warmup` steps, then the schedule.

    >>> [factor(step, 10, "linear", 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if step < warmup:
        return (step + 1) / warmup
    gone = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if schedule == "linear":
        return 1 - gone
    return 1.0 if schedule == "constant" else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * gone))


def run(job: Job) -> dict[str, Any]:
    """Train once and return the line of the results."""
    torch.set_num_threads(1)
    task, metric = build(job)
    model = task.model
    made = METHODS[job.method](task, job.lr, job.steps, **dict(job.method_options))
    warmup = job.steps // 10 if made.warmup else 0
    schedules = (
        []
        if made.own_schedule
        else [
            LambdaLR(o, partial(factor, steps=job.steps, schedule=job.schedule, warmup=warmup)) for o in made.optimizers
        ]
    )
    fault = dict(job.fault)
    spoiled: list[int] = []
    losses: list[float] = []
    series: list[float] = []
    balance: list[float] = []
    started, used = time.perf_counter(), time.process_time()
    for optimizer in made.optimizers:
        getattr(optimizer, "train", lambda: None)()
    for step in range(job.steps):
        for optimizer in made.optimizers:
            optimizer.zero_grad()
        loss = task.loss(model, task.batch(step))
        torch.autograd.backward(loss)
        if fault:
            source = tasks.generator(job.seed, 77, step)
            if faulty(fault, step, source):
                spoiled.append(step)
                inject(fault["kind"], model, source)
        made.before()
        for optimizer in made.optimizers:
            optimizer.step()
        if job.method == "gso":
            series.append(float(made.optimizers[0]._series.of_late))
            balance.append(float(made.optimizers[0].records[0].balance))
        for schedule in schedules:
            schedule.step()
        losses.append(float(loss.detach()))
        if len(losses) > 50 and not any(math.isfinite(x) and x < 1e6 * abs(losses[0]) for x in losses[-50:]):
            break
    used, taken = time.process_time() - used, time.perf_counter() - started
    for optimizer in made.optimizers:
        getattr(optimizer, "eval", lambda: None)()
    metrics = task.evaluate(model)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    stride = max(1, len(losses) // 50)
    collective = made.collective
    return {
        "score": metrics[metric],
        "metric": metric,
        "metrics": metrics,
        "diverged": not finite or len(losses) < job.steps,
        "fired": None if collective is None else len(collective.fired),
        "fired_at_faults": None if collective is None else len(set(collective.fired) & set(spoiled)),
        "spoiled": len(spoiled),
        "largest_median": None if collective is None else round(max(collective.medians), 3),
        "series": round(max(series), 3) if series else None,
        "shortened": sum(number > DEEP for number in series) if series else None,
        "outweighed": sum(factor < 1 for factor in balance) if balance else None,
        "cpu_seconds": round(used, 2),
        "seconds": round(taken, 2),
        "losses": [float(f"{statistics.fmean(losses[i : i + stride]):.4g}") for i in range(0, len(losses), stride)],
    }


# ---- the queue


def done() -> dict[str, dict[str, Any]]:
    """Key of a job -> its line."""
    if not RUNS.is_file():
        return {}
    rows = [json.loads(line) for line in RUNS.read_text(encoding="utf8").splitlines()]
    return {row["key"]: row for row in rows}


def append(job: Job, result: dict[str, Any], conditions: dict[str, Any]) -> None:
    """Add one line; a lock keeps two drivers apart."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    row = {"key": job.key, **job.as_dict(), **result, **conditions, "date": date}
    with RUNS.open("a", encoding="utf8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def execute(jobs: list[Job], workers: int, *, since: str = "") -> None:
    """Run what is missing, in order, and anew GSO's runs of before `since`; the later line of a run counts."""
    finished = {key: row for key, row in done().items() if row["method"] != "gso" or row["date"] >= since}
    missing = list({job.key: job for job in jobs if job.key not in finished}.values())
    where = evidence.conditions()
    conditions = {
        "hardware": where["hardware"],
        "torch": where["versions"]["torch"],
        "command": "benchmarks/" + where["command"],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        futures = {pool.submit(run, job): job for job in missing}
        for count, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            try:
                result = future.result()
            except Exception as error:
                print(f"FAILED {job.key}: {type(error).__name__}: {error}", flush=True)
                continue
            append(job, result, conditions)
            print(
                f"{count}/{len(missing)} {result['score']:.4f} fired {result['fired']} {result['cpu_seconds']:.0f}s "
                f"({result['seconds']:.0f}s) {job.key}",
                flush=True,
            )


def summaries(jobs: list[Job]) -> Iterator[str]:
    """One line for each setting: median, range, number of seeds, times that the collective rule fired."""
    finished = done()
    cells: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        if job.key in finished:
            cells.setdefault(job.cell, []).append(finished[job.key])
    for cell, rows in cells.items():
        scores = [row["score"] for row in rows]
        middle, low, high = statistics.median(scores), min(scores), max(scores)
        fired = [row["fired"] for row in rows if row["fired"] is not None]
        lost = sum(row["diverged"] for row in rows)
        cpu = statistics.median(row["cpu_seconds"] for row in rows)
        yield (
            f"{middle:.4f} [{low:.4f} {high:.4f}] n={len(rows)} seeds={[row['seed'] for row in rows]} "
            f"lost={lost} fired={fired} cpu={cpu:.0f}s {cell}"
        )


def main(asked_for: Sequence[str]) -> None:
    """Run, list or show groups of runs."""
    parser = argparse.ArgumentParser(prog="gso.py", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", default="", help="names, comma-separated, in the order in which they run")
    parser.add_argument("--show", default="", help="names of groups whose medians are printed")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--since", default="", help="also GSO's runs of before this date, 'YYYY-MM-DD HH:MM'")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args(asked_for)
    if asked.list:
        finished = done()
        for name, jobs in GROUPS.items():
            print(f"{name}: {sum(job.key in finished for job in jobs)} of {len(jobs)}")
    for name in filter(None, asked.show.split(",")):
        print(f"== {name}")
        print("\n".join(summaries(GROUPS[name])))
    if asked.groups:
        execute([job for name in asked.groups.split(",") for job in GROUPS[name]], asked.jobs, since=asked.since)
