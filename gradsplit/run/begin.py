"""The first thing that happens in a process of the script: attach when torch arrives."""

from __future__ import annotations

import sys

from .arrival import when_imported
from .settings import Settings

__all__ = ["begin"]


def begin() -> None:
    """Read the settings of this run, if any, and attach as soon as torch has been imported."""
    settings = Settings.from_environment()
    if settings is not None:
        when_imported("torch", lambda: _attach(settings))


def _attach(settings: Settings) -> None:
    try:
        from .session import Session

        Session(settings).install()
    except Exception as error:  # the script comes first
        print(f"gradsplit: not attached, the script runs without ({error!r})", file=sys.stderr)
