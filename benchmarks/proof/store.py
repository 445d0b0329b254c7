"""The finished runs of the proof, a line each; a run that failed is a line of a file of its own."""

from __future__ import annotations

import datetime
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsplit.lab.sweep import finite_or_none

RESULTS = Path(__file__).parents[1] / "results" / "proof"
RUNS, FAILED, TABLES = RESULTS / "runs.jsonl", RESULTS / "failed.jsonl", RESULTS / "tables.json"
COSTS = RESULTS / "costs.json"


def done() -> dict[str, dict[str, Any]]:
    """Key of a job -> its line; a line that was cut off is done again."""
    if not RUNS.is_file():
        return {}
    held = {}
    for line in RUNS.read_text(encoding="utf8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        held[row["key"]] = row
    return held


_unwritten: list[tuple[Path, str]] = []  # lines that a full disk has refused so far


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line, and those before it that the disk has refused; a refusal is named, and the queue goes on."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    _unwritten.append((path, json.dumps(finite_or_none({**row, "date": date})) + "\n"))
    try:
        while _unwritten:
            append_line(*_unwritten[0])
            _unwritten.pop(0)
    except OSError as error:
        print(f"not written yet: {len(_unwritten)} lines: {error}. Make room; the next run tries again.", flush=True)


def close() -> None:
    """Try once more to write what the disk has refused; print what it still refuses, so that the log keeps it.

    Raises:
        SystemExit: lines were printed instead of written.
    """
    while _unwritten:
        try:
            append_line(*_unwritten[0])
        except OSError as error:
            print("\n".join(line.strip() for _, line in _unwritten), flush=True)
            raise SystemExit(f"proof.py: {len(_unwritten)} lines are above, not in the file: {error}.") from error
        _unwritten.pop(0)


def append_line(path: Path, line: str) -> None:
    """Add a line, whole or not at all."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line.encode()) < len(line.encode()):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
