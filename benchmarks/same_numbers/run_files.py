"""`gradsplit run` on small scripts: what they print, what the run files hold, what `gradsplit report` says of them."""

from __future__ import annotations

import functools
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from same_numbers.sheet import Notes, Sheet

BEGIN = """
import torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
data = torch.randn(160, 4, 6)

def end():
    for p in model.parameters():
        print(p.detach().double().sum().item().hex())
"""
SCRIPTS = {
    "clipped.py": BEGIN + """
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=50)
for step in range(80):
    for micro in range(2):
        (model(data[(2 * step + micro) % 160]).square().mean() / 2).backward()
    if step == 70:
        model[2].weight.grad[1:3] *= 1e6
    if step == 74:
        model[4].bias.grad[0] = float("nan")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if step == 74:
        optimizer.zero_grad()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
end()
""",
    "two.py": BEGIN + """
first = torch.optim.SGD(model[:3].parameters(), 0.05, momentum=0.9)
second = torch.optim.SGD(model[3:].parameters(), 0.1)
for step in range(20):
    for optimizer in (first, second):
        first.zero_grad(), second.zero_grad()
        loss = model(data[step]).square().mean() * (1e5 if step == 12 else 1.0)
        loss.backward()
        if step == 15:
            model[0].weight.grad[2, 1] = float("inf")
        optimizer.step()
end()
""",
    "lost.py": BEGIN + """
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
for step in range(40):
    optimizer.zero_grad()
    loss = model(data[step]).square().mean()
    if step == 30:
        loss = loss * float("inf")
    loss.backward()
    optimizer.step()
end()
""",
}  # fmt: skip
RUNS = {
    "watch": ("clipped.py", ["--watch", "--to", "jsonl:rows.jsonl"]),
    "control": ("two.py", ["--control"]),
    "levels": ("clipped.py", ["--control", "--plan", "tree_sp", "--budget", "root@fixed:limit=1", "--budget",
                              "module@ema:ratio=1.2", "--budget", "relative_step:tau=0.02"]),
    "guard": ("lost.py", ["--watch", "--guard"]),
}  # fmt: skip
VECTORS = ("step", "loss", "lr", "own_scale", "skipped", "total")
MOMENT = re.compile(r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}")


def part(sheet: Sheet) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            sheet.run(f"run/{name}", functools.partial(fresh, run=name, folder=Path(folder)))


def gradsplit(words: list[str], folder: Path) -> str:
    """What a command prints; its code goes with it."""
    command = [str(Path(sys.executable).parent / "gradsplit"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        print(done.stderr, file=sys.stderr)
    return f"{done.stdout}code {done.returncode}\n"


def make_run(run: str, folder: Path) -> str:
    """Record one script into `<run>.db` and return what it printed."""
    script, options = RUNS[run]
    (folder / script).write_text(SCRIPTS[script], encoding="utf8")
    return gradsplit(["run", "--quiet", "--record", f"{run}.db", *options, script], folder)


def fresh(notes: Notes, *, run: str, folder: Path) -> None:
    notes.note("printed", make_run(run, folder))
    content(notes, folder / f"{run}.db")
    report(notes, run, folder)
    rows = folder / "rows.jsonl"
    if rows.exists():
        notes.note("rows", [{**json.loads(line), "time": 0} for line in rows.read_text(encoding="utf8").splitlines()])
        rows.unlink()


def report(notes: Notes, run: str, folder: Path) -> None:
    said = gradsplit(["report", f"{run}.db", "--no-page", "--jsonl", f"{run}.jsonl"], folder)
    notes.text("report", MOMENT.sub("(moment)", said))
    lines = [json.loads(line) for line in (folder / f"{run}.jsonl").read_text(encoding="utf8").splitlines()]
    notes.note("lines", [{**line, "time": 0} for line in lines])


def content(notes: Notes, place: Path) -> None:
    """The run file by its documented tables, whatever was flushed together; times are left out."""
    with sqlite3.connect(place) as db:
        db.row_factory = sqlite3.Row
        meta = {row["key"]: json.loads(row["value"]) for row in db.execute("SELECT * FROM meta")}
        notes.note("meta", {key: meta.get(key) for key in ("mode", "guarded", "exception", "max_megabytes")})
        notes.note("meta", [{**action, "time": 0, "reason": ""} for action in meta.get("guard", [])])
        for stream in db.execute("SELECT * FROM stream ORDER BY id"):
            own = {key: stream[key] for key in ("id", "optimizer", "controlled", "num_leaves")}
            notes.note("streams", own, json.loads(stream["outline"]))
            notes.note("about", json.loads(stream["about"]))
            chunks = db.execute("SELECT * FROM chunk WHERE stream = ? ORDER BY first_row", (stream["id"],)).fetchall()
            for name in VECTORS:
                notes.note(name, b"".join(chunk[name] for chunk in chunks))
            for name, bytes_each in {"norm": 2, "peak": 2, "kept": 2, "scaled": 4, "zeroed": 4}.items():
                notes.note(name, _table(chunks, name, bytes_each, stream["num_leaves"]))
        events = db.execute("SELECT stream, step, leaf, kind, count FROM event ORDER BY stream, step, kind, leaf")
        notes.note("events", [tuple(row) for row in events])
    db.close()


def _table(chunks: list[Any], name: str, bytes_each: int, num_leaves: int) -> np.ndarray:
    """Rows x leaves of one column over all chunks: numbers lie leaf after leaf, wide ones all high bytes first."""
    tables = [np.zeros((0, num_leaves), np.int64)]
    for chunk in chunks:
        if chunk[name] is None:
            tables.append(np.zeros((chunk["num_rows"], num_leaves), np.int64))
            continue
        raw = np.frombuffer(zlib.decompress(chunk[name]), np.uint8)
        if bytes_each == 2:
            high, low = raw.reshape(2, -1).astype(np.int64)
            numbers = high * 256 + low
        else:
            numbers = raw.view("<i4").astype(np.int64)
        tables.append(numbers.reshape(num_leaves, -1).T)
    return np.concatenate(tables)
