"""The table of rules: how each ATen operation acts on truncated power series.

Adding one is a function and a row. The function has the operation's own signature; any tensor argument may be a
``Series`` (it depends on the step) or an ordinary tensor (it does not), and at least one is a ``Series``:

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
    """Register operations that are linear in their tensors: they act on every order alone."""
    for op in ops:
        RULES[op] = _linear_rule(op)


def rule_of(op: Any) -> Rule:
    """The rule of an overload, or of the packet it belongs to.

    Raises:
        UnsupportedOperation: there is none; the message says how to add it.
    """
    found = RULES.get(op) or RULES.get(getattr(op, "overloadpacket", op))
    if found is None:
        raise UnsupportedOperation(
            f"taylor_ladder: expected operations with a rule for power series, got {op} on a value that depends on "
            f"the step. Add one: write a function with this operation's arguments and register it with "
            f"`@gradsplit.ladder.rules.rule(torch.ops.{str(op).rsplit('.', 1)[0]})`; "
            "gradsplit/ladder/rules/elementwise.py shows how, docs/ladder.md explains."
        )
    return found


def _linear_rule(op: Any) -> Rule:
    def apply(*args: Any, **kwargs: Any) -> Any:
        return map_orders(op, args, kwargs)

    return apply
