"""A decision that is worked out when somebody looks at it: its scales have been applied bin by bin already."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from ..plan import Plan
from ..xp import Array
from .decision import Decision

__all__ = ["DeferredDecision"]


class DeferredDecision(Decision):
    """A `Decision` made on first use; for budgets without history, so that it does not matter when.

    Args:
        plan: the plan it is for.
        make: returns the decision.
    """

    def __init__(self, plan: Plan, make: Callable[[], Decision]) -> None:
        vars(self).update(plan=plan, _make=make)

    @cached_property
    def _made(self) -> Decision:
        decision: Decision = vars(self).pop("_make")()
        return decision

    @property
    def norm_B(self) -> Array:  # noqa: D102
        return self._made.norm_B

    @property
    def finite_B(self) -> Array:  # noqa: D102
        return self._made.finite_B

    @property
    def scale_B(self) -> Array:  # noqa: D102
        return self._made.scale_B

    @property
    def limits(self) -> tuple[tuple[str, Array | None, Array], ...]:  # noqa: D102
        return self._made.limits

    def __reduce__(self) -> tuple[Any, ...]:
        return Decision, (self.plan, self.norm_B, self.finite_B, self.scale_B, self.limits)
