"""The fault campaign: bad values in gradients, optimizer state and batches, against six ways to control gradients.

    OMP_NUM_THREADS=1 python benchmarks/faults.py runs       # about 1 s a run; goes on where it was stopped
    python benchmarks/faults.py page                         # sums up and writes the tables of docs/faults.md

Every run is a row of benchmarks/results/faults-runs.csv; the sums are in benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASKS = {"runs": "benchmarks.faults.grid", "ranks": "benchmarks.faults.ranks", "page": "benchmarks.faults.page"}


def main() -> None:
    """Run one task; its own options follow its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("task", choices=sorted(TASKS))
    known, rest = parser.parse_known_args()
    importlib.import_module(TASKS[known.task]).main(rest)


if __name__ == "__main__":
    main()
