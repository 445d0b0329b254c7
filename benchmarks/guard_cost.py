"""What a guard costs a training step of the text GPT at 100 steps between snapshots, in memory and on disk.

Windows of 100 steps alternate between unguarded and guarded in one process and one model. What is compared is processor
time of the whole process, the thread that writes snapshots included; a busy machine distorts it less than wall time.
The time inside the guard's own calls is kept beside it, since it is a small difference of large numbers otherwise.

Run: python benchmarks/guard_cost.py --out benchmarks/results/guard_cost.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

import gradsplit as gs
from gradsplit.lab.registry import REGISTRY

EVERY = 100


def main() -> None:
    """Train in windows, print the shares, keep every window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task = REGISTRY["gpt"].build(seed=0)
    optimizer = torch.optim.AdamW(task.model.parameters(), 1e-3)
    numel = sum(parameter.numel() for parameter in task.model.parameters())
    windows: dict[str, list[float]] = {"alone": [], "memory": [], "disk": []}
    inside: dict[str, list[float]] = {"memory": [], "disk": []}
    step = 0
    with tempfile.TemporaryDirectory() as folder:
        guards = {
            "alone": None,
            "memory": gs.Guard(task.model, optimizer, every=EVERY),
            "disk": gs.Guard(task.model, optimizer, every=EVERY, folder=folder),
        }
        for window in range(asked.rounds + 1):
            for kind, guard in guards.items():
                spent, began = 0.0, time.process_time()
                for _ in range(EVERY):
                    batch = task.batch(step)
                    step += 1
                    optimizer.zero_grad()
                    loss = task.loss(task.model, batch)
                    loss.backward()
                    optimizer.step()
                    if guard is not None:
                        entered = time.thread_time()
                        guard.step(loss)
                        spent += time.thread_time() - entered
                if guard is not None and kind == "disk":
                    guard.snapshots.wait()
                if window:  # the first round makes states, memory and files
                    windows[kind].append((time.process_time() - began) / EVERY)
                    if guard is not None:
                        inside[kind].append(spent / EVERY)
    alone = statistics.median(windows["alone"])
    shares = {kind: statistics.median(values) / alone for kind, values in inside.items()}
    ratios = {kind: statistics.median(windows[kind]) / alone for kind in inside}
    print(f"{numel:,} parameters, {asked.rounds} windows of {EVERY} steps each, {alone * 1e3:.1f} ms a step alone")
    for kind, share in shares.items():
        print(f"{kind}: {share:.2%} of a step inside the guard; whole process {ratios[kind]:.3f} of alone")
    if asked.out:
        about = {
            "command": "python benchmarks/guard_cost.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, 1 thread of 2 shared cores, torch {torch.__version__}",
            "parameters": numel,
            "every": EVERY,
            "inside_share": shares,
            "process_over_alone": ratios,
        }
        raw = {"about": about, "seconds_a_step": windows, "seconds_inside_a_step": inside}
        asked.out.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
