"""What happens when the script imports torch: a session attaches to its optimizers.

Python itself runs `begin` at the start of every process of the script, through ``site/sitecustomize.py``. Nothing here
imports torch, so that a process that never trains does not wait for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

from .settings import Settings

__all__ = ["when_imported", "begin"]


class _Once(importlib.abc.MetaPathFinder):
    """Finds a module as Python would without it, and calls back when the module has been executed.

    The module keeps its own loader. Only the loader's ``exec_module`` is covered, for this one call. So ``__loader__``,
    ``__spec__``, the sources in tracebacks and the resources are the same as without us.
    """

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute, cover = loader.exec_module, cast(Any, loader)

        def exec_module(module: ModuleType) -> None:
            del cover.exec_module  # uncovers the loader's own method
            execute(module)
            self._then()

        cover.exec_module = exec_module
        return spec


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call ``then`` once the module has been imported; call it now if it has been already."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Once(name, then))


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
