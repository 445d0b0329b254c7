"""Data files that an installed package carries, found without running the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gradsplit.workloads.task import MissingDataError


def package_folder(name: str, call: str, install: str) -> Path:
    """The folder of package `name`; the package is not imported, since that would pull in its dependencies.

    Args:
        name: an importable top-level package.
        call: the caller, for the error.
        install: the command that installs it.

    Raises:
        MissingDataError: it is not installed; the text names `install`.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(
            f"{call}: expected the package {name}, whose data files are read, found none. Run: {install}"
        )
    return Path(spec.submodule_search_locations[0])
