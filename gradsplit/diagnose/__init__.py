"""What is wrong with the gradient of a net: findings in plain words, worst first, each with its evidence."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from .diagnosis import Diagnosis, diagnose
from .finding import Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]


class _Callable(ModuleType):
    """This package, made callable. Its import binds `gradsplit.diagnose` to it, but the public name is a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Diagnosis:
        return diagnose(*args, **kwargs)


__signature__ = inspect.signature(diagnose)
sys.modules[__name__].__class__ = _Callable
