"""The small array namespace in which budgets and projection are written: one text for numpy, torch and others.

`namespace(array)` finds the namespace of an array by the module of its type, so no framework is imported that the
caller has not imported. `numpy_xp` says what each function is. All are pure: nothing is changed in place, nothing waits
for a device.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

__all__ = ["NAMESPACES", "Array", "namespace"]

Array = Any
"""An array of any of the frameworks below."""

NAMESPACES: dict[str, str] = {
    "numpy": "numpy_xp",
    "torch": "torch_xp",
    "jax": "jax_xp",
    "jaxlib": "jax_xp",
    "tensorflow": "tensorflow_xp",
}
"""Root package of an array's type -> module of this package."""

_LOADED: dict[str, ModuleType] = {}
"""Those imported already; a traced step finds its namespace here, since imports cannot be traced."""


def namespace(array: Array, *, call: str = "namespace(…)") -> ModuleType:
    """Return the namespace module for an array.

    Raises:
        TypeError: an array of an unknown framework.

    >>> import numpy as np
    >>> namespace(np.ones(2)).__name__
    'gradsplit.xp.numpy_xp'
    """
    for kind in type(array).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _LOADED:
            return _LOADED[root]
        if root in NAMESPACES:
            _LOADED[root] = importlib.import_module(f".{NAMESPACES[root]}", __name__)
            return _LOADED[root]
    raise TypeError(
        f"{call}: expected an array of {', '.join(NAMESPACES)}, got {type(array).__module__}."
        f"{type(array).__name__}. Pass norms and limits as arrays of the framework that trains."
    )
