"""What a user asked for, checked when it is said, and as plain values that a `.keras` file can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...budget import BUDGETS, RULES, Budget, budgets_by_level
from ...functional import orientation_of
from ...plan import Layout, Plan, make_plan, tree_sp
from ...plan.registry import strategy_named

__all__ = ["Options"]

_ALL_LEVELS = tree_sp(Layout.from_shapes({"module.kernel": (2, 2)}), inner="xsp")
"""A plan with nodes at every level, to look at a budget before there is a model."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of `split` and `GSO` that are not Keras' own.

    Raises:
        ValueError: an unknown name, level or rule; a strategy that needs energies before there are any.
        TypeError: something that is neither a plan nor a budget.
    """

    call: str
    plan: Any
    budget: Any
    rule: str
    orientation: Any

    def __post_init__(self) -> None:
        if (
            isinstance(self.plan, str)
            and strategy_named(self.plan, call=f"{self.call}(plan={self.plan!r})").needs_energy
        ):
            raise ValueError(
                f"{self.call}(plan={self.plan!r}): expected a plan that does not need energies, since there are none "
                "before training. Measure them with gradsplit.integrations.keras.energies and pass the Plan, "
                f"plan=gradsplit.{self.plan}(layout_of(model), energy)."
            )
        if not (isinstance(self.plan, (str, Plan)) or callable(self.plan)):
            make_plan(self.plan, _ALL_LEVELS.layout, call=self.call)  # says what was expected
        if self.rule not in RULES:
            raise ValueError(f"{self.call}(rule={self.rule!r}): expected one of {', '.join(RULES)}.")
        if self.orientation is not None:
            orientation_of(self.orientation, call=self.call)
        self.budgets  # noqa: B018 - an unknown budget is refused now, not at the first step

    @property
    def budgets(self) -> list[tuple[str, Budget]]:
        """Pairs (level, budget)."""
        return budgets_by_level(self.budget, _ALL_LEVELS, call=self.call)

    def to_config(self, made: Plan | None) -> dict[str, Any]:
        """Return plain values; ``made`` is the plan in force, which stands for a function.

        Raises:
            ValueError: a function that has made no plan yet, a budget of the user's own.
        """
        plan = made if callable(self.plan) and made is not None else self.plan
        if not isinstance(plan, (str, Plan)):
            raise ValueError(
                f"{self.call}(plan=…).get_config(): expected a plan that can be saved, got a function that has made "
                "none yet. Build the optimizer first, or pass a strategy's name or a Plan."
            )
        return {
            "plan": plan if isinstance(plan, str) else plan.to_dict(),
            "budget": _plain(self.budget, self.call),
            "rule": self.rule,
            "orientation": None if self.orientation is None else {k: _axes(v) for k, v in self.orientation.items()},
        }

    @classmethod
    def of(cls, call: str, *, plan: Any, budget: Any, rule: str, orientation: Any) -> Options:
        """Read arguments, or what `to_config` made of them."""
        plan = Plan.from_dict(plan) if isinstance(plan, Mapping) else plan
        return cls(call, plan, _lively(budget), rule, orientation)


def _axes(axes: Any) -> Any:
    return axes if isinstance(axes, int) else list(axes)


def _plain(budget: Any, call: str) -> Any:
    if isinstance(budget, Budget):
        if BUDGETS.get(budget.name) is not type(budget):
            raise ValueError(
                f"{call}(budget=…).get_config(): expected registered budgets, got {type(budget).__name__}, which a "
                "file cannot hold. Register it with gradsplit.budget.register, here and where you load."
            )
        constants = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(budget).items()}
        return {"name": budget.name, **constants}
    if isinstance(budget, Mapping):
        return {"levels": {level: _plain(one, call) for level, one in budget.items()}}
    return [_plain(one, call) for one in budget] if isinstance(budget, (tuple, list)) else budget


def _lively(budget: Any) -> Any:
    if isinstance(budget, Mapping) and "name" in budget:
        constants = {k: tuple(v) if isinstance(v, list) else v for k, v in budget.items() if k != "name"}
        return BUDGETS[budget["name"]](**constants)
    if isinstance(budget, Mapping):
        return {level: _lively(one) for level, one in budget.get("levels", budget).items()}
    return tuple(map(_lively, budget)) if isinstance(budget, (tuple, list)) else budget
