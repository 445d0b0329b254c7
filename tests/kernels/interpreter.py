"""Triton's programs in a process of their own, since the interpreter is chosen when Triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.architecture.sources import ROOT


def found_by(module: str, folder: Path) -> dict[str, str]:
    """What each case of a module of runs found in the interpreter; empty where all was as it should be."""
    done = _run(["-W", "ignore", "-m", module, str(folder)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def compiled(source: str, folder: Path) -> list[str]:
    """The words that a program printed, the first of which says that it compiled for cards."""
    done = _run(["-c", source], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    words = done.stdout.split()
    assert words[:1] == ["compiled"], done.stderr[-2000:]
    return words


def equal(difference: Callable[..., str], options: dict[str, Any]) -> str:
    """A run of the programs, which must not fall back."""
    from gradsplit.kernels.addressable import FallbackWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        return difference(**options)


def falls_back(module: Any, difference: Callable[..., str], options: dict[str, Any]) -> str:
    """What a run warned of, in one text; the difference if the result is another."""
    from gradsplit.kernels.addressable import FallbackWarning

    before, options = module.LONGEST, dict(options)
    module.LONGEST = options.pop("longest", before)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = difference(**options)
    finally:
        module.LONGEST = before
    said = [str(warning.message) for warning in caught if issubclass(warning.category, FallbackWarning)]
    return found or " | ".join(said)


def _run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
