"""Raw results with the conditions they were measured under."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def conditions() -> dict[str, Any]:
    """Hardware, versions, date and a hash of the package's source."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "gradsplit").rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "source": digest.hexdigest()[:16],
    }


def save(name: str, command: str, data: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json; whoever reads it meanwhile sees the old file or the new one."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"command": command, "conditions": conditions(), **data}, indent=1) + "\n")
    part.replace(path)
    return path


class Rows:
    """The rows of one result file, saved as they come, so that a campaign goes on where it stopped.

    Args:
        name: of the file in benchmarks/results; rows that are there already are kept.
        command: what the file says it was made with.
        keys: the fields that tell one run from another.
    """

    def __init__(self, name: str, command: str, keys: tuple[str, ...]) -> None:
        self.name, self.command, self.keys = name, command, keys
        path = RESULTS / f"{name}.json"
        known = json.loads(path.read_text())["rows"] if path.exists() else []
        self.by_key = {tuple(row[key] for key in keys): row for row in known}

    def missing(self, *values: Any) -> bool:
        """Whether the run with these values, in the order of the keys, is still to be made."""
        return values not in self.by_key

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and write the file."""
        self.by_key[tuple(row[key] for key in self.keys)] = row
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        self.write()

    def write(self, **facts: Any) -> Path:
        """Write the file, its rows in the order of their keys."""
        rows = [self.by_key[key] for key in sorted(self.by_key)]
        return save(self.name, self.command, {**facts, "rows": rows})


def middle(values: Iterable[float]) -> float:
    """The median; a value that is not finite counts as the worst, 0."""
    return statistics.median(value if value == value and abs(value) != float("inf") else 0.0 for value in values)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
