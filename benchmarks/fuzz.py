"""Fuzzing the package with random, hostile and damaged input; every case is (target, seed) and can be run again alone.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py                                # 100,000 cases
    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --target plans --seed 1234 --cases 1

What came of them is written to benchmarks/results/fuzz.json: cases, answers, refusals and failures by target.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
SECONDS = 20  # of processor time, after which a case counts as a hang
WAIT = 600  # seconds, likewise, of a case that only waits
CASES = {
    "layouts": 26_000,
    "plans": 8_000,
    "budgets": 12_000,
    "projections": 12_000,
    "states": 8_000,
    "damaged_bytes": 8_000,
    "damaged_rows": 8_000,
    "checkpoint_bytes": 4_000,
    "command_lines": 2_000,
    "configurations": 12_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=sorted(CASES), action="append", help="may be repeated; all by default")
    parser.add_argument("--cases", type=int, default=None, help="of each target")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next")
    parser.add_argument("--out", type=Path, default=None, help="where the counts go; by default nowhere for a part")
    asked = parser.parse_args()
    counts = {name: run(name, asked.seed, asked.cases or CASES[name]) for name in asked.target or CASES}
    place = asked.out or (RESULT if asked.cases is None and asked.seed == 0 else None)
    if place is not None:
        save(place, counts)
    sys.exit(any(count["failures"] for count in counts.values()))


def run(name: str, first_seed: int, cases: int) -> dict[str, Any]:
    """Run cases of one target; failures keep their seeds and the last lines of their tracebacks."""
    import torch

    from benchmarks.fuzz import TARGETS

    torch.set_num_threads(1)
    for kind in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(kind, _hang)
    began, kinds, failures = time.process_time(), collections.Counter(), []
    for seed in range(first_seed, first_seed + cases):
        torch.manual_seed(seed)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(WAIT)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # of arithmetic that went wrong unseen
                kinds[TARGETS[name](random.Random(f"{name}/{seed}"))] += 1
        except Exception as error:
            last = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            failures.append({"seed": seed, "place": place, "error": f"{type(error).__name__}: {error}"[:600]})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
    seconds = time.process_time() - began
    print(f"{name:<15} {cases:>7} cases {dict(kinds)} {len(failures)} failures, {seconds:.0f} s", flush=True)
    for failure in {failure["place"]: failure for failure in failures}.values():
        print(f"    {failure}", flush=True)
    return {
        "cases": cases,
        "first_seed": first_seed,
        "answered": kinds["ok"],
        "refused": kinds["refused"],
        "failures": failures,
        "seconds": round(seconds, 1),
    }


def save(place: Path, counts: dict[str, Any]) -> None:
    """Enter the counts; targets that were run alone take the place of their older counts."""
    from gradsplit.lab.evidence import conditions

    held = json.loads(place.read_text(encoding="utf8"))["targets"] if place.is_file() else {}
    at = conditions()
    held |= {name: {**count, "date": at["date"], "commit": at["commit"]} for name, count in counts.items()}
    targets = {name: held[name] for name in CASES if name in held}
    total = {key: sum(count[key] for count in targets.values()) for key in ("cases", "answered", "refused")}
    total["failures"] = sum(len(count["failures"]) for count in targets.values())
    place.write_text(json.dumps({"conditions": at, "total": total, "targets": targets}, indent=1) + "\n")
    print(f"{total} -> {place}")


def _hang(kind: int, _: object) -> None:
    spent = f"{SECONDS} s of processor time" if kind == signal.SIGPROF else f"{WAIT} s"
    raise TimeoutError(f"no end after {spent}")


if __name__ == "__main__":
    main()
