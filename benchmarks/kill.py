"""``kill -9`` at random moments of a training that records and writes checkpoints; what is left, and how it goes on.

One training, with dropout, a shuffling loader, a learning-rate schedule, a splitter with history, a guard, a run file
and a checkpoint every few steps, is run once undisturbed. Then it is begun again and again, each time killed once to
three times at random moments, and resumed until it ends. Counted are ends whose weights differ from the undisturbed
ones by a bit, run files that do not open or lack a row that had been acknowledged, checkpoints that do not load or are
older than the last one acknowledged, and kills that fell into the writing of a checkpoint.

A process is forked from one that has imported everything, but for ``--fresh`` kills, which hit a new interpreter.

Run: python benchmarks/kill.py --out benchmarks/results/kill.json
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gradsplit as gs
from gradsplit.watch.record import Recorder, RunFile, RunWriter

EPOCHS, BATCHES, CHECKPOINT_EVERY, FLUSH_EVERY = 4, 25, 3, 2


def train(folder: Path) -> None:
    """Train from the checkpoint in the folder, or from the beginning; leave the hash of the last weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    x = torch.randn(8 * BATCHES, 16)
    y = (x[:, :4].cumsum(1) > 0).long().sum(1).clamp(max=3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 256), nn.BatchNorm1d(256), nn.Tanh(), nn.Dropout(0.2), nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, EPOCHS * BATCHES)
    numbers = len(list(folder.glob("run-*.db")))
    recorder = Recorder([RunWriter(folder / f"run-{numbers}.db")], seconds=0.05)
    splitter = gs.GradientSplitter(model, budget=gs.Ema(1.2), optimizer=optimizer, sinks=[recorder], backend="eager")
    guard = gs.Guard(model, optimizer, splitter, schedule, every=20)
    batches = guard.batches(loader)
    acknowledge = os.open(folder / "acknowledged", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    checkpoint = folder / "run.ckpt"
    if checkpoint.exists():
        gs.load_checkpoint(checkpoint, **guard.parts)
    os.write(acknowledge, f"begin {numbers} {guard.step_count}\n".encode())
    norms = []
    while batches.epoch < EPOCHS:
        for inputs, targets in batches:
            optimizer.zero_grad()
            noise = random.random() + np.random.rand()  # noqa: NPY002 - all three generators matter
            loss = nn.functional.cross_entropy(model(inputs + 0.01 * noise), targets)
            loss.backward()
            norms.append(float(splitter.step().total_norm()))
            optimizer.step()
            schedule.step()
            guard.step(loss)
            if guard.step_count % CHECKPOINT_EVERY == 0:
                gs.save_checkpoint(checkpoint, **guard.parts)
                os.write(acknowledge, f"checkpoint {numbers} {guard.step_count}\n".encode())
            if guard.step_count % FLUSH_EVERY == 0:
                recorder.flush()
                os.write(acknowledge, f"rows {numbers} {len(norms)} {norms[-1].hex()}\n".encode())
    recorder.close()
    end = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()
    (folder / "end.txt").write_text(end, encoding="utf8")


def import_all() -> None:
    """Import before the first fork what torch and this package import when something is first made or called."""
    weight = nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.AdamW([weight])
    gs.GradientSplitter([("weight", weight)], budget=gs.Ema(1.2), optimizer=optimizer, backend="eager")
    gs.Guard(nn.ParameterList([weight]), optimizer)


def begin(folder: Path, fresh: bool) -> int:
    """Start a process that trains and return its number."""
    if fresh:
        return subprocess.Popen([sys.executable, __file__, "--train", str(folder)], stderr=subprocess.DEVNULL).pid
    pid = os.fork()
    if pid == 0:
        try:
            train(folder)
        finally:
            os._exit(0)
    return pid


def told(folder: Path) -> list[list[str]]:
    """What the processes of a training have acknowledged, in words; a line that was cut is none."""
    place = folder / "acknowledged"
    lines = place.read_text(encoding="utf8").splitlines(keepends=True) if place.exists() else []
    return [line.split() for line in lines if line.endswith("\n")]


def run_until(folder: Path, fresh: bool, seconds: float | None) -> bool:
    """Train in a process of its own; kill it so long after it began to train, if asked. Whether it was killed."""
    before = len(told(folder))
    pid = begin(folder, fresh)
    while len(told(folder)) == before and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.002)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # it had ended before it could be looked at
        status = 0
    return os.WIFSIGNALED(status)


def faults_of(folder: Path, counts: dict[str, int]) -> None:
    """Count what a kill has left wrong."""
    said = told(folder)
    last = max((int(words[1]) for words in said), default=0)
    counts["torn_writes"] += len(list(folder.glob(".run.ckpt.*.part")))
    for left in folder.glob(".run.ckpt.*.part"):
        left.unlink()
    saved = [int(words[2]) for words in said if words[0] == "checkpoint"]
    if saved:
        try:
            guard = torch.load(folder / "run.ckpt", weights_only=True)["parts"]["guard"]
            counts["checkpoints_lost"] += guard["step_count"] < saved[-1]
        except Exception:
            counts["checkpoints_lost"] += 1
    rows = [(int(words[2]), float.fromhex(words[3])) for words in said if words[:2] == ["rows", str(last)]]
    counts["rows_acknowledged"] += rows[-1][0] if rows else 0
    try:
        with RunFile(folder / f"run-{last}.db") as file:
            counts["files_opened"] += 1
            series = file.series(file.streams[0]) if rows else None
    except Exception:
        counts["files_broken"] += 1
        return
    for number, norm in rows:
        assert series is not None
        right = series.num_rows >= number and np.isclose(series.total_R[number - 1], norm, rtol=1e-6)
        counts["rows_lost"] += not right


def main() -> None:
    """Kill, resume, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--fresh", type=int, default=10, help="of the kills, so many hit a new interpreter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        train(asked.train)
        return
    draw = random.Random(asked.seed)
    names = ("kills", "resumes", "trainings", "wrong_ends", "checkpoints_lost", "torn_writes")
    counts = dict.fromkeys((*names, "files_opened", "files_broken", "rows_acknowledged", "rows_lost"), 0)
    moments: list[int] = []
    with tempfile.TemporaryDirectory() as base:
        import_all()
        first = Path(base) / "undisturbed"
        first.mkdir()
        run_until(first, False, None)
        expected, steps = (first / "end.txt").read_text(encoding="utf8"), EPOCHS * BATCHES
        began = time.monotonic()
        again = Path(base) / "again"
        again.mkdir()
        run_until(again, False, None)
        seconds = time.monotonic() - began
        if (again / "end.txt").read_text(encoding="utf8") != expected:
            raise SystemExit("the undisturbed training is not reproducible; nothing can be compared with it")
        while counts["kills"] < asked.kills:
            folder = Path(base) / f"training-{counts['trainings']}"
            folder.mkdir()
            counts["trainings"] += 1
            for _ in range(draw.randint(1, 3)):
                fresh = counts["kills"] >= asked.kills - asked.fresh
                done = max([int(words[2]) for words in told(folder) if words[0] == "checkpoint"], default=0)
                moment = draw.uniform(0, seconds * (1 - done / steps))
                if counts["kills"] == asked.kills or not run_until(folder, fresh, moment):
                    break
                counts["kills"] += 1
                faults_of(folder, counts)
                moments.append(done)
            if not (folder / "end.txt").exists():
                run_until(folder, counts["kills"] > asked.kills - asked.fresh, None)
            counts["resumes"] += sum(words[0] == "begin" for words in told(folder)) - 1
            end = folder / "end.txt"
            counts["wrong_ends"] += not end.exists() or end.read_text(encoding="utf8") != expected
    print(json.dumps(counts, indent=1))
    if asked.out:
        about = {
            "command": f"python benchmarks/kill.py --kills {asked.kills} --fresh {asked.fresh} --seed {asked.seed}",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, 1 thread of 2 shared cores, torch {torch.__version__}",
            "steps": steps,
            "fresh": asked.fresh,
            "checkpoint_every": CHECKPOINT_EVERY,
        }
        raw = {"about": about, "counts": counts, "checkpoint_when_begun": moments}
        asked.out.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf8")
    if counts["wrong_ends"] or counts["checkpoints_lost"] or counts["files_broken"] or counts["rows_lost"]:
        raise SystemExit("something was lost")


if __name__ == "__main__":
    main()
