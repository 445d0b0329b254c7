"""Running something between backward and the update of any optimizer, through its own step hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Handle", "attach_to", "untraced"]


class Handle:
    """Removes what `attach_to` registered; removing twice does nothing."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Detach."""
        while self._handles:
            self._handles.pop().remove()


def attach_to(
    optimizer: torch.optim.Optimizer,
    *,
    before: Callable[[], Any],
    after: Callable[[], Any] | None = None,
    start: Callable[[], Any] | None = None,
) -> Handle:
    """Call ``start`` when a step begins, ``before`` when its gradients are complete, ``after`` when it has updated.

    With a closure (LBFGS, Lightning) backward runs inside ``step``: then ``before`` runs at the end of the closure,
    every time it is called; ``start`` and ``after`` run once.
    """

    def pre(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if start is not None:
            start()
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            before()
            return None

        def closure_then_before() -> Any:
            loss = closure()
            with torch.no_grad():
                before()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_before}
        return (args[0], closure_then_before, *args[2:]), kwargs

    handles: list[Any] = [optimizer.register_step_pre_hook(pre)]
    if after is not None:
        handles.append(optimizer.register_step_post_hook(lambda *_: after()))
    return Handle(handles)


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
