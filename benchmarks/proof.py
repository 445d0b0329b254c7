"""The proof: every workload, GSO with nothing chosen beside the baselines of the day, each with a grid of its own.

    python benchmarks/proof.py --list                            # the groups of runs, how many, how many are done
    python benchmarks/proof.py --groups first,edges,confirm      # runs what is missing; a restart goes on
    python benchmarks/proof.py --show first                      # medians of what is done
    python benchmarks/proof.py costs                             # what a step costs, 5 minutes
    python benchmarks/proof.py page                              # writes docs/results/README.md's tables and picture

One process, one thread. Every finished run is a line of benchmarks/results/proof/runs.jsonl; a run that fails is a line
of failed.jsonl, and the queue goes on. Seed 1000 chooses, seeds from 0 on confirm. Data that no Python package
installs is read from the folder that GRADSPLIT_DATA names; a workload without its data is left out by name.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASKS = {
    "runs": "benchmarks.proof.runs",
    "costs": "benchmarks.proof.costs",
    "page": "benchmarks.proof.page",
}


def main() -> None:
    """Run one task with its own options; options alone are those of the runs."""
    asked = sys.argv[1:]
    name = asked.pop(0) if asked and not asked[0].startswith("-") else "runs"
    if name not in TASKS:
        sys.exit(f"benchmarks/proof.py {name}: expected one of {', '.join(TASKS)}.")
    importlib.import_module(TASKS[name]).main(asked)


if __name__ == "__main__":
    main()
