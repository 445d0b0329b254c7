"""Where run files are put; nothing here imports torch, for the command that starts a script needs it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

__all__ = ["free_name"]


def free_name(path: str | os.PathLike[str]) -> Path:
    """Return the path itself, or ``name-2.db``, ``name-3.db``, … whichever does not exist yet."""
    place = Path(path)
    for number in itertools.count(2):
        if not place.exists():
            return place
        place = Path(path).with_stem(f"{Path(path).stem}-{number}")
    raise AssertionError("count() never ends")
