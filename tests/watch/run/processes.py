"""Starting scripts with and without gradsplit, and reading what they left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.architecture.sources import ROOT


def environment(**more: str) -> dict[str, str]:
    """One thread, the checkout importable for the command itself, nothing of gradsplit's own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GRADSPLIT")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **more}


def run_python(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, as a user would start it."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_gradsplit(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`gradsplit run` with these arguments."""
    return run_python(folder, "-m", "gradsplit.cli.run", *words, **more)


def without_ours(text: str) -> str:
    """Standard error without the lines that begin with our name."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("gradsplit:"))
