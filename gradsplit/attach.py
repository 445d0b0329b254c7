"""Running something between backward and the update of any optimizer, through its own step hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Handle", "attach_to"]


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
