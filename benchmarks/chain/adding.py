"""Adding (Hochreiter and Schmidhuber 1997); see `long_tasks`."""

from __future__ import annotations

from benchmarks.chain import long_tasks


def main(arguments: list[str]) -> None:
    long_tasks.main(arguments, "adding")
