"""The fault campaign: bad values in gradients, optimizer state and batches, against six ways to control gradients.

    OMP_NUM_THREADS=1 python benchmarks/faults.py runs       # about 1 s a run; goes on where it was stopped
    OMP_NUM_THREADS=1 python benchmarks/faults.py ranks      # the same on ranks of gloo, 2 s a run
    OMP_NUM_THREADS=1 python benchmarks/faults.py moments    # what large values leave in Adam's moments, 10 s
    python benchmarks/faults.py page                         # sums up and writes the tables of docs/results/faults.md

Every run is a row of benchmarks/results/faults-runs.csv or faults-ranks.csv; the sums are in faults.json and
faults-ranks.json.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASKS = {
    "runs": "benchmarks.faults.grid",
    "ranks": "benchmarks.faults.ranks",
    "moments": "benchmarks.faults.moments",
    "page": "benchmarks.faults.page",
}


def main() -> None:
    """Run one task; its own options follow its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("task", choices=sorted(TASKS))
    known, rest = parser.parse_known_args()
    importlib.import_module(TASKS[known.task]).main(rest)


if __name__ == "__main__":
    main()
