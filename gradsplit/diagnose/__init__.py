"""Findings: what is wrong with the gradient of a net, in words, worst first, each with its evidence."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .diagnosis import Diagnosis, diagnose
from .finding import Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]


class _Callable(ModuleType):
    """Importing binds `gradsplit.diagnose` to this package, where the public name is a function: so it is one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Diagnosis:
        return diagnose(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
