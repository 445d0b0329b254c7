"""What `gradsplit run --watch` costs a training step, recording on: a 23-million-parameter GPT, and a tiny network.

Steps alternate between watched and not in one process and one model; what is compared is processor time (all threads
of the process, the recorder's own included), which a busy machine distorts less than wall time. "Inside" is the time in
our own code before backward and at the step.

With ``--samples`` every third step is watched together with its samples; ratios are those of neighbouring steps.

Run: python benchmarks/run_overhead.py --out benchmarks/results/run_overhead.json
     python benchmarks/run_overhead.py --samples --out benchmarks/results/run_samples.json
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
from typing import Any

import torch

from gradsplit.lab.registry import REGISTRY
from gradsplit.watch.run.session import Session
from gradsplit.watch.run.settings import Settings

OPTIONS = {"layers": 13, "width": 384, "heads": 6, "context": 128, "batch": 2}


def gpt() -> tuple[Any, Any]:
    """The model and a function from a step to its loss."""
    task = REGISTRY["gpt"].build(seed=0, **OPTIONS)
    return task.model, lambda step: task.loss(task.model, task.batch(step))


def tiny() -> tuple[Any, Any]:
    """A network of 1,185 parameters."""
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 27), torch.nn.Linear(27, 1)
    )
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return model, lambda step: (model(x + 0.001 * step) - x[:, :1]).square().mean()


def measured(make: Any, pairs: int, warm: int, *, samples: bool = False) -> dict[str, Any]:
    """Train for a few steps and return the seconds of each."""
    model, loss_at = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ways = ("alone", "watched", "samples") if samples else ("alone", "watched")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    inside: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Settings(record=str(Path(folder) / "run.db"), quiet=True, samples=samples))
        watching, spent = False, 0.0

        def pre(*arguments: object) -> None:
            nonlocal spent
            if watching:
                began = time.thread_time()
                session.pre(*arguments)  # type: ignore[arg-type]
                spent += time.thread_time() - began

        optimizer.register_step_pre_hook(pre)
        for step in range(len(ways) * (pairs + warm)):
            way = ways[step % len(ways)]
            if session._samples is not None:
                (session._samples.open if way == "samples" else session._samples.close)()
            watching, spent, began = way != "alone", 0.0, time.process_time()
            optimizer.zero_grad()
            loss = loss_at(step)
            if watching:
                start = time.thread_time()
                session._before_backward(loss, session.losses.note(loss))
                spent += time.thread_time() - start
            loss.backward()
            optimizer.step()
            if (
                step >= len(ways) * warm
            ):  # the optimizer's state, the names and the order of the forward pass are made in the first
                seconds[way].append(time.process_time() - began)
                inside += [spent] if way == "watched" else []
        session.close()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **seconds,
        "inside": inside,
        **{f"median_{way}": statistics.median(seconds[way]) for way in ways},
        "median_inside": statistics.median(inside),
        "inside_share": statistics.median(inside) / statistics.median(seconds["alone"]),
        **{
            f"ratio_{way}": statistics.median(a / b for a, b in zip(seconds[way], seconds["alone"], strict=True))
            for way in ways[1:]
        },
    }


def main() -> None:
    """Print the medians, keep every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--samples", action="store_true", help="also measure --samples")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "tiny": measured(tiny, 25 * asked.pairs, 20, samples=asked.samples),
        "gpt": measured(gpt, asked.pairs, 9, samples=asked.samples),
    }
    for name, values in found.items():
        alone, watched, inside = (values[f"median_{word}"] * 1e3 for word in ("alone", "watched", "inside"))
        print(
            f"{name}, {values['parameters']:,} parameters, medians of {len(values['alone'])} steps each, processor time"
        )
        print(
            f"  alone {alone:.3f} ms, watched {watched:.3f} ms, inside {inside:.3f} ms, {inside / alone:.2%} of a step"
        )
        if asked.samples:
            print(
                f"  with samples {values['median_samples'] * 1e3:.3f} ms; over the step before it alone: watched "
                f"{values['ratio_watched']:.3f}, with samples {values['ratio_samples']:.3f}"
            )
    if asked.out:
        about = {
            "command": "python benchmarks/run_overhead.py" + (" --samples" if asked.samples else ""),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, 1 thread of 2 shared cores, torch {torch.__version__}",
            "options": OPTIONS,
        }
        asked.out.write_text(json.dumps({"about": about, **found}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
