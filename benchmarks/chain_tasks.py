"""Training tasks of the chain: detector, healthy heads, recurrences, deep stacks, healthy runs and the cost of hooks.

Each subcommand writes raw values with seeds to benchmarks/results/chain_<task>.json and prints its table. One thread:

    OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py detector --optimizer sgdm       # about 10 minutes
"""

from __future__ import annotations

import argparse
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

TASKS = {
    "detector": "benchmarks.chain.detector",
    "healthy-heads": "benchmarks.chain.healthy_heads",
    "fork-signals": "benchmarks.chain.fork_signals",
    "temporal-order": "benchmarks.chain.temporal_order",
    "adding": "benchmarks.chain.adding",
    "deep-stack": "benchmarks.chain.deep_stacks",
    "healthy-runs": "benchmarks.chain.healthy_runs",
    "cost": "benchmarks.chain.cost",
}


def main() -> None:
    """Run one task; its own options follow its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(TASKS))
    known, rest = parser.parse_known_args()
    importlib.import_module(TASKS[known.task]).main(rest)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
