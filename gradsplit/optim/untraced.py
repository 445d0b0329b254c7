"""torch's optimizer methods without the import of torch's compiler, for programs that do not use it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["untraced"]


def untraced(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizer as it is beneath its guard against being traced.

    torch keeps ``add_param_group``, ``zero_grad`` and the like out of its compiler's graphs by a wrapper that imports
    the compiler at the first call, which takes most of a second. As long as nothing has imported it nothing can be
    traced, and the guard guards nothing. A method that is not wrapped by torch, one of a class in between or a patched
    one, is returned as it came.

    >>> untraced(len) is len
    True
    """
    bound: Any = method
    function: Any = getattr(bound, "__func__", None)
    guarded = getattr(function, "__globals__", {}).get("__name__") == "torch._compile"
    if not guarded or "torch._dynamo" in sys.modules:
        return method
    bare: Callable[..., Any] = function.__wrapped__.__get__(bound.__self__)
    return bare
