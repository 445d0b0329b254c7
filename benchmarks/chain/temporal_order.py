"""Temporal order (Pascanu et al. 2013); see `long_tasks`."""

from __future__ import annotations

from benchmarks.chain import long_tasks


def main(arguments: list[str]) -> None:
    long_tasks.main(arguments, "temporal-order")
