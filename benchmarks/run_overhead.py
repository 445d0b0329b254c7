"""What `gradsplit run --watch` costs a training step of a 24-million-parameter GPT, recording on.

Steps alternate between watched and not in one process and one model; what is compared is processor time (all threads
of the process, the recorder's own included), which a busy machine distorts less than wall time.

Run: python benchmarks/run_overhead.py --out benchmarks/results/run_overhead.json
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

from gradsplit.lab.registry import REGISTRY
from gradsplit.watch.run.session import Session
from gradsplit.watch.run.settings import Settings

OPTIONS = {"layers": 13, "width": 384, "heads": 6, "context": 128, "batch": 2}


def main() -> None:
    """Train for a few steps, print the medians, keep every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task = REGISTRY["gpt"].build(seed=0, **OPTIONS)
    optimizer = torch.optim.AdamW(task.model.parameters(), 1e-4)
    numel = sum(parameter.numel() for parameter in task.model.parameters())
    seconds: dict[bool, list[float]] = {False: [], True: []}
    inside: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Settings(record=str(Path(folder) / "run.db"), quiet=True))
        watching = False

        def pre(*arguments: object) -> None:
            if watching:
                began = time.thread_time()
                session.pre(*arguments)  # type: ignore[arg-type]
                inside.append(time.thread_time() - began)

        optimizer.register_step_pre_hook(pre)
        for step in range(2 * asked.pairs + 4):
            watching = step % 2 == 1
            batch, began = task.batch(step), time.process_time()
            optimizer.zero_grad()
            loss = task.loss(task.model, batch)
            if watching:
                session.losses.note(loss)
            loss.backward()
            optimizer.step()
            if step >= 4:  # the optimizer's state and the names are made in the first steps
                seconds[watching].append(time.process_time() - began)
        session.close()
    alone, watched = (statistics.median(seconds[kind]) for kind in (False, True))
    hook = statistics.median(inside[2:])
    print(f"{numel / 1e6:.1f} M parameters, median of {asked.pairs} steps each, processor time")
    print(f"alone {alone * 1e3:.1f} ms, watched {watched * 1e3:.1f} ms")
    print(f"in the hook {hook * 1e3:.1f} ms, {hook / alone:.2%} of a step")
    if asked.out:
        about = {
            "command": "python benchmarks/run_overhead.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, 1 thread of 2 shared cores, torch {torch.__version__}",
            "parameters": numel,
            "options": OPTIONS,
            "in_hook_share": hook / alone,
            "watched_over_alone": watched / alone,
        }
        raw = {"alone": seconds[False], "watched": seconds[True], "in_hook": inside[2:]}
        asked.out.write_text(json.dumps({"about": about, "seconds": raw}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
