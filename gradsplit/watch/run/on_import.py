"""What happens when the script imports torch: a session attaches to its optimizers.

Python itself runs `begin` at the start of every process of the script, through ``site/sitecustomize.py``. Nothing here
imports torch, so that a process that never trains does not wait for it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

from .ending import Ending, say
from .settings import Settings

__all__ = ["when_imported", "begin"]


class _Once(importlib.abc.MetaPathFinder):
    """Finds a module as Python would without it, and calls back when the module has been executed.

    Many packages only ask whether torch is there (``importlib.util.find_spec``). So this finder stays until the module
    has been executed, however often it is asked. The module keeps its own loader: only the loader's ``exec_module`` is
    covered, until its first call. So ``__loader__``, ``__spec__``, the sources in tracebacks and the resources are the
    same as without us.
    """

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then, self._done = name, then, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name or self._done:
            return None
        spec = self._found_by_others(fullname, path, target)
        loader = None if spec is None else spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        execute, cover = loader.exec_module, cast(Any, loader)

        def exec_module(module: ModuleType) -> None:
            if vars(cover).get("exec_module") is exec_module:
                del cover.exec_module  # uncovers the loader's own method
            execute(module)
            self._arrived()

        try:
            cover.exec_module = exec_module
        except AttributeError:  # a loader without a place for it: what is left is to say so at the end
            return spec
        return spec

    def _found_by_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                found: importlib.machinery.ModuleSpec = spec
                return found
        return None

    def _arrived(self) -> None:
        if self._done:
            return
        self._done = True
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._then()


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call ``then`` once the module has been executed; call it now if that has happened already."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Once(name, then))


def begin() -> None:
    """Read the settings of this run, if any, and attach as soon as torch has been imported."""
    settings = Settings.from_environment()
    if settings is not None:
        ending = Ending(settings)
        ending.install()
        when_imported("torch", lambda: _attach(settings, ending))


def _attach(settings: Settings, ending: Ending) -> None:
    """Attach now, or at the script's first module or optimizer where gradsplit itself is being imported just now.

    A script that imports gradsplit before torch imports torch from within gradsplit: half of it is not there yet.
    """
    if any(_is_ours_and_half_there(name) for name in list(sys.modules)):
        _when_first_made(lambda: _attach(settings, ending))
        return
    try:
        from .session import Session

        session = Session(settings, closes=False)
        session.install()
        ending.session = session
    except Exception as error:  # the script comes first
        say(f"not attached, the script runs without ({error!r})")


def _is_ours_and_half_there(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return name.partition(".")[0] == "gradsplit" and bool(getattr(spec, "_initializing", False))


def _when_first_made(then: Callable[[], None]) -> None:
    """Call ``then`` before the first module or optimizer is made, and put back what was covered for that."""
    import torch

    covered = [(owner, owner.__init__) for owner in (torch.nn.Module, torch.optim.Optimizer)]

    def cover(owner: Any, made: Any) -> None:
        @functools.wraps(made)
        def make(*args: Any, **kwargs: Any) -> None:
            for one, own in covered:
                one.__init__ = own  # type: ignore[method-assign]
            then()
            made(*args, **kwargs)

        owner.__init__ = make

    for owner, made in covered:
        cover(owner, made)
