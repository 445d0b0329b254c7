"""GSO's trials, and its comparison with other optimizers, on the project's own tasks.

    python benchmarks/gso.py --list                      # the groups of runs, how many, how many are done
    python benchmarks/gso.py --groups proof-main         # runs what is missing; a restart goes on where it stopped
    python benchmarks/gso.py --show proof-main           # medians of what is done
    python benchmarks/gso.py seconds                     # CPU time per step, 4 minutes
    python benchmarks/gso.py medians                     # what the collective rule sees, 5 minutes
    python benchmarks/gso.py hot-stack                   # why the GSO of before failed on the hot stack, 5 minutes
    python benchmarks/gso.py decay --decay convolutions=0.3 --tasks healthy     # which tensors profit from decay
    python benchmarks/gso.py page                        # writes docs/results/gso.md
    python benchmarks/gso.py picture                     # draws the README's picture

Every finished run is a line of benchmarks/results/gso/runs.jsonl, with its setting, seed, score, hardware, date and
command. Seeds 0 and 1 choose; seeds from 10 on confirm.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASKS = {
    "runs": "benchmarks.gso.runs",
    "seconds": "benchmarks.gso.seconds",
    "medians": "benchmarks.gso.medians",
    "hot-stack": "benchmarks.gso.hot_stack",
    "decay": "benchmarks.gso.decay",
    "page": "benchmarks.gso.page",
    "picture": "benchmarks.gso.picture",
}


def main() -> None:
    """Run one task with its own options; options alone are those of the runs."""
    asked = sys.argv[1:]
    name = asked.pop(0) if asked and not asked[0].startswith("-") else "runs"
    if name not in TASKS:
        sys.exit(f"benchmarks/gso.py {name}: expected one of {', '.join(TASKS)}.")
    importlib.import_module(TASKS[name]).main(asked)


if __name__ == "__main__":
    main()
