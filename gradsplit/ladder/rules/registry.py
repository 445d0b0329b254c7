"""The table of rules: how each ATen operation acts on truncated power series.

A new rule is a function and a row. The function has the operation's own signature. A tensor argument is a ``Series`` if
it depends on the step and an ordinary tensor if it does not; at least one argument is a ``Series``:

    >>> import torch
    >>> from gradsplit.ladder.rules import rule
    >>> from gradsplit.ladder.series import square
    >>> @rule(torch.ops.aten.absolute_square)  # doctest: +SKIP
    ... def absolute_square(x):
    ...     return square(x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..series import map_orders

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


class UnsupportedOperation(LookupError):
    """An operation of the traced loss has no rule for power series."""


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operations (``torch.ops.aten.name``, or one overload of it)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def linear(*ops: Any) -> None:
    """Register operations that are linear in their tensors; they act on every order alone."""
    for op in ops:
        RULES[op] = _linear_rule(op)


def rule_of(op: Any) -> Rule:
    """Return the rule of an overload, or of the packet to which it belongs.

    Raises:
        UnsupportedOperation: there is no rule; the message says how to add one.
    """
    found = RULES.get(op) or RULES.get(getattr(op, "overloadpacket", op))
    if found is None:
        raise unsupported(op, f"{op} on a value that depends on the step")
    return found


def unsupported(op: Any, got: str) -> UnsupportedOperation:
    """Return the error for an operation without a rule; ``got`` says what the loss asks for."""
    packet = getattr(op, "overloadpacket", op)
    return UnsupportedOperation(
        f"taylor_ladder: expected operations with a rule for power series, got {got}. Add a rule: write a function "
        f"with this operation's arguments and register it with `@gradsplit.ladder.rules.rule(torch.ops.{packet})`, as "
        "gradsplit/ladder/rules/elementwise.py shows and docs/reference/ladder.md explains."
    )


def _linear_rule(op: Any) -> Rule:
    def apply(*args: Any, **kwargs: Any) -> Any:
        return map_orders(op, args, kwargs)

    return apply
