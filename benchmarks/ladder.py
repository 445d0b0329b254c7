"""The ladder: what it costs, how far it can be trusted, and the recipe of 292 steps.

Each subcommand writes raw values to benchmarks/results/ladder-<name>.json and prints its table:

    python benchmarks/ladder.py cost --threads 2      # orders 1 to 99 and nested autograd, about 4 minutes
    python benchmarks/ladder.py safe-step             # 200 draws, about 3 minutes on one core
    python benchmarks/ladder.py long-step             # the finding of diagnose, about 15 minutes on one core
    python benchmarks/ladder.py recipe                # seconds
    python benchmarks/ladder.py weights FILE.npz      # parameters for benchmarks/ladder_jet.py, which needs JAX
    python benchmarks/ladder.py page                  # writes the tables of the docs from the raw results
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TASKS = {
    "cost": "benchmarks.ladder.cost",
    "safe-step": "benchmarks.ladder.safe_step",
    "long-step": "benchmarks.ladder.long_step",
    "recipe": "benchmarks.ladder.recipe",
    "weights": "benchmarks.ladder.weights",
    "page": "benchmarks.ladder.page",
}


def main() -> None:
    """Run one task; its own options follow its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("task", choices=sorted(TASKS))
    known, rest = parser.parse_known_args()
    if "--threads" in rest:
        os.environ["OMP_NUM_THREADS"] = rest[rest.index("--threads") + 1]
    importlib.import_module(TASKS[known.task]).main(rest)


if __name__ == "__main__":
    main()
