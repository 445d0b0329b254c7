"""Raw results as JSON, with the conditions they were measured under."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gradsplit.lab.evidence import conditions

RESULTS = Path(__file__).resolve().parents[1] / "results"


def save(name: str, data: dict[str, Any]) -> Path:
    """Write benchmarks/results/ladder-<name>.json."""
    path = RESULTS / f"ladder-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "benchmarks/ladder.py", *sys.argv[1:]])
    head = {"command": command, "conditions": conditions(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps({**head, **data}, indent=1) + "\n")
    return path


def load(name: str) -> dict[str, Any]:
    """What an earlier run has saved, or an empty mapping."""
    path = RESULTS / f"ladder-{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
