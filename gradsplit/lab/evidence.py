"""Where a number comes from: hardware, versions, date, command and commit, written beside every raw result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["conditions", "hardware", "installed_versions"]

PACKAGES = (
    *("torch", "numpy", "numba", "scikit-learn", "pycocotools", "deepforest"),
    *("pytorch-optimizer", "prodigyopt", "schedulefree"),
)


def hardware() -> str:
    """The processor's model, the number of logical cores this process may use, and the GPU if any."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text(encoding="utf8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {cores} core{'s' if cores != 1 else ''}{gpu}"


def installed_versions() -> dict[str, str]:
    """Versions of Python, gradsplit and of the installed packages that decide a result."""
    from .. import __version__

    found = {"python": platform.python_version(), "gradsplit": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    place = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(place), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of the source, with "+" where files of the package differ from it; "" outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if head and _git("status", "--porcelain", "--", str(Path(__file__).parents[1])) else "")
    except OSError:  # no git
        return ""


def command() -> str:
    """The command line as somebody would type it again."""
    program = Path(sys.argv[0]).name
    return shlex.join(["gradsplit" if program in ("gradsplit", "__main__.py", "-c") else program, *sys.argv[1:]])


def conditions() -> dict[str, Any]:
    """All of the above, with the date in UTC and the number of threads a run computes with."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(),
        "threads_a_run": 1,
        "versions": installed_versions(),
        "commit": commit(),
        "command": command(),
    }
