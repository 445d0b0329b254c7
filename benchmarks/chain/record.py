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
    """Write benchmarks/results/<name>.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "conditions": conditions(), **data}, indent=1) + "\n")
    return path


def middle(values: Iterable[float]) -> float:
    """The median; a value that is not finite counts as the worst, 0."""
    return statistics.median(value if value == value and abs(value) != float("inf") else 0.0 for value in values)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
