"""What the library does on one graphics card: right, without waiting, at what cost, and to what end.

    python benchmarks/gpu.py                       # about 6 minutes; writes gpu.json and gpu.md
    python benchmarks/gpu.py --seconds 120         # two minutes for each training run, as for a publication: 18 minutes
    python benchmarks/gpu.py --tiny --device cpu   # all of it in a tiny setting, to see that it runs

(a) every kernel against the definition, (b) no wait for the device in a step, and capture in a CUDA graph, (c) time,
memory and launches beside `clip_grad_norm_`, fused AdamW and Muon, (d) a GPT of 30 million parameters on the text of
Python's standard library. Each job is written down as soon as it is done, and a second call goes on where the first
one was stopped. A job that fails is named, and the others go on; then the script ends with 1. Without a card it says
so and ends with 0.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu.kernels import DTYPES, STRIDES, beyond_job, decision_job, gso_job, kernel_job
from benchmarks.gpu.page import page
from benchmarks.gpu.setting import BUDGETS, Job, Setting
from benchmarks.gpu.steps import cost_job, layouts, steps_of, sync_job
from benchmarks.gpu.training import TRAINED, train_job
from gradsplit.lab.speed.figures import gpt

FOLDER = Path(__file__).parent / "results"


def jobs(setting: Setting) -> Iterator[tuple[str, Job]]:
    """Names and jobs, in the order in which they are done."""
    for backend in ("triton", "eager"):
        for dtype in DTYPES:
            for strides in STRIDES:
                what = {"backend": backend, "dtype": dtype, "strides": strides}
                yield f"a/{backend}/{str(dtype)[6:]}/{strides}", functools.partial(kernel_job, **what)
    yield "a/triton/beyond 2^31 elements", beyond_job
    for budget in BUDGETS:
        yield f"a/decision/{budget}", functools.partial(decision_job, budget=budget)
    for dtype in DTYPES:
        yield f"a/GSO/{str(dtype)[6:]}", functools.partial(gso_job, dtype=dtype)
    for name in steps_of(setting, gpt(1, 8, 9, 4)):
        if "clip" not in name and "AdamW, fused" not in name and "Muon" not in name:
            yield f"b/{name}", functools.partial(sync_job, name=name)
    for name in TRAINED:
        yield f"d/{name}", functools.partial(train_job, name=name)
    for layout in layouts(setting):
        for name in steps_of(setting, gpt(1, 8, 9, 4)):
            yield f"c/{layout}/{name}", functools.partial(cost_job, layout=layout, name=name)


def run(setting: Setting, place: Path, only: str = "") -> int:
    """Do every job that is not done yet, and write the results after each; return how many have failed."""
    about, begun = setting.about(), time.monotonic()
    known = json.loads(place.read_text(encoding="utf8")) if place.exists() else {}
    fits = known.get("about") == about
    done: dict[str, Any] = known["jobs"] if fits else {}
    if known and not fits:
        place.replace(place.with_suffix(".before.json"))
        print(f"{place} is of another machine, version or setting: kept as {place.with_suffix('.before.json').name}")
    todo = [(name, job) for name, job in jobs(setting) if name.startswith(only)]
    for number, (name, job) in enumerate(todo, 1):
        if "failed" in done.get(name, {"failed": 0}):
            before = time.monotonic()
            try:
                done[name] = job(setting)
            except Exception as error:  # one job that fails must not end the others
                lines = traceback.format_exc().splitlines()[-6:]
                done[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}", "where": lines}
            done[name]["took"] = round(time.monotonic() - before, 2)
            said = {k: v for k, v in done[name].items() if k not in ("curve", "where", "took")}
            print(f"[{number}/{len(todo)}] {time.monotonic() - begun:6.1f} s  {name}: {str(said)[:150]}", flush=True)
            gc.collect()
            if setting.on_card:
                torch.cuda.empty_cache()
        _write(place, {"about": about, "date": time.strftime("%Y-%m-%d"), "jobs": done})
    place.with_suffix(".md").write_text(page(json.loads(place.read_text(encoding="utf8"))), encoding="utf8")
    failed = [name for name, _ in todo if "failed" in done[name]]
    print(f"{len(todo)} jobs, {len(failed)} failed: {place} and {place.with_suffix('.md').name}")
    for name in failed:
        print(f"  {name}: {done[name]['failed']}")
    return len(failed)


def _write(place: Path, found: dict[str, Any]) -> None:
    beside = place.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1), encoding="utf8")
    os.replace(beside, place)


def main(words: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER / "gpu.json", help="the results; the page stands beside it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a setting for tests")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the six training runs")
    parser.add_argument("--only", default="", help="the beginning of the jobs' names, for example a/ or c/ResNet")
    asked = parser.parse_args(words)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: skipped, torch sees no graphics card here. --tiny --device cpu shows that it runs.")
        return 0
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    return int(run(Setting(asked.device, tiny=asked.tiny, seconds=asked.seconds), asked.out, asked.only) > 0)


if __name__ == "__main__":
    sys.exit(main())
