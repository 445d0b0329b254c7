"""Code that runs before and after the step of any optimizer, and marks that keep code out of torch's compiler."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["Handle", "after_backward", "attach_to", "constant_while_traced", "not_traced", "without_compiler_guard"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Handle:
    """Removes what `attach_to` registered; a second removal does nothing."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Detach."""
        while self._handles:
            self._handles.pop().remove()


def after_backward(act: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``act`` when the gradients of a step are complete; a hook before the step calls this.

    Without a closure the gradients are complete when the step begins, and ``act`` runs at once. With a closure (LBFGS,
    Lightning) the backward pass runs inside the step. Then ``act`` runs without gradients at the end of every call of
    the closure.

    Args:
        act: what to do with the complete gradients.
        args: the positional arguments of ``step``, the optimizer first.
        kwargs: its keyword arguments.

    Returns:
        The arguments with the closure replaced, for the hook to return; None without a closure.

    >>> order = []
    >>> (_, closure), _ = after_backward(lambda: order.append("act"), ("sgd", lambda: order.append("backward")), {})
    >>> closure(); order
    ['backward', 'act']
    """
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    if closure is None:
        act()
        return None

    def closure_then_act() -> Any:
        loss = closure()
        with torch.no_grad():
            act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_then_act}
    return (args[0], closure_then_act, *args[2:]), kwargs


def attach_to(
    optimizer: torch.optim.Optimizer,
    *,
    before: Callable[[], Any],
    after: Callable[[], Any] | None = None,
    start: Callable[[], Any] | None = None,
) -> Handle:
    """Call ``start`` when a step begins, ``before`` when its gradients are complete, and ``after`` when it has updated.

    With a closure ``before`` runs at the end of every call of the closure, as `after_backward` says; ``start`` and
    ``after`` run once.
    """

    def pre(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if start is not None:
            start()
        return after_backward(before, args, kwargs)

    handles: list[Any] = [optimizer.register_step_pre_hook(pre)]
    if after is not None:
        handles.append(optimizer.register_step_post_hook(lambda *_: after()))
    return Handle(handles)


def not_traced(function: Function) -> Function:
    """Return a function that ``torch.compile`` calls as it is and never takes into a graph.

    ``torch.compiler.disable`` does the same, but it imports the compiler, which takes most of a second. Here a program
    that compiles nothing never imports it. A function that was marked before the import is kept out of graphs too.

    >>> not_traced(len)([1, 2])
    2
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def outside_of_graphs(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    outside_of_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside_of_graphs  # type: ignore[return-value]


def constant_while_traced(function: Function) -> Function:
    """Mark a function that ``torch.compile`` runs once, while it traces; the graph keeps only the result.

    ``torch.compiler.assume_constant_result`` sets the same mark, but it imports the compiler.

    >>> @constant_while_traced
    ... def answer():
    ...     return 42
    >>> answer()
    42
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def without_compiler_guard(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizer as it is beneath torch's own guard against the compiler.

    torch wraps ``add_param_group``, ``zero_grad`` and some others, so that its compiler does not trace them. The
    wrapper imports the compiler at the first call, which takes most of a second. Nothing can be traced before
    something else has imported the compiler, so until then the method runs without the wrapper. Other methods are
    returned unchanged: those of a class in between, and those that someone has patched.

    >>> without_compiler_guard(len) is len
    True
    """
    bound: Any = method
    function: Any = getattr(bound, "__func__", None)
    guarded = getattr(function, "__globals__", {}).get("__name__") == "torch._compile"
    if not guarded or "torch._dynamo" in sys.modules:
        return method
    bare: Callable[..., Any] = function.__wrapped__.__get__(bound.__self__)
    return bare
