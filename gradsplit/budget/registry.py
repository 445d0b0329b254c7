"""The budgets by name, and how a user's ``budget=`` becomes a list of (level, budget)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..plan import LEVELS, Plan
from .base import Budget
from .ema import Ema
from .fixed import Fixed
from .percentile import Percentile
from .relative import Relative
from .relative_step import RelativeStep
from .zscore import ZScore

__all__ = ["BUDGETS", "DEFAULT_OF_GSO", "DEFAULT_OF_SPLITTER", "budgets_by_level"]

BUDGETS: dict[str, type[Budget]] = {row.name: row for row in (RelativeStep, Fixed, Relative, Ema, ZScore, Percentile)}

DEFAULT_OF_GSO = (Relative(0.2), RelativeStep(0.03))
"""Before the moments, since one huge gradient would poison them for thousands of steps; and on the update."""

DEFAULT_OF_SPLITTER = RelativeStep(0.03, length=1.0)
"""In front of SGD. Under Adam-like updates, which fill every limit, a length of 1 is too much for short rows."""


def budgets_by_level(budget: Any, plan: Plan, *, call: str) -> list[tuple[str, Budget]]:
    """Return (level, budget) pairs from a budget, a name, a tuple of them, or a mapping from levels to these.

    Without a level a budget bounds the bins.

    Raises:
        ValueError: an unknown budget or level, a level the plan does not have, an empty mapping.
        TypeError: something that is no budget.

    >>> from gradsplit.plan import Layout, xsp
    >>> plan = xsp(Layout.from_shapes({"w": (4, 3)}))
    >>> budgets_by_level({"root": Fixed(1.0), "bin": "ema"}, plan, call="f")[0]
    ('root', Fixed(limit=1.0))
    """
    if not isinstance(budget, Mapping):
        budget = {"bin": budget}
    pairs: list[tuple[str, Budget]] = []
    for level, value in budget.items():
        if level not in LEVELS:
            raise ValueError(f"{call}(budget={{{level!r}: …}}): expected a level of {', '.join(LEVELS)}.")
        if not len(plan.level_nodes(level)):
            raise ValueError(
                f"{call}(budget={{{level!r}: …}}): expected a plan with nodes at level {level!r}, got {plan!r} "
                "without. "
                "The module tree comes with tree_sp(layout, inner=…)."
            )
        for one in value if isinstance(value, (tuple, list)) else (value,):
            pairs.append((level, _one(one, call)))
    if not pairs:
        raise ValueError(
            f"{call}(budget={budget!r}): expected at least one budget. Fixed(float('inf')) bounds nothing."
        )
    return pairs


def _one(value: Any, call: str) -> Budget:
    if isinstance(value, Budget):
        return value
    if isinstance(value, str):
        if value in BUDGETS:
            return BUDGETS[value]()
        near = difflib.get_close_matches(value, BUDGETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{call}(budget={value!r}): expected one of {', '.join(BUDGETS)}.{hint}")
    hint = f" Write {value.__name__}()." if isinstance(value, type) and issubclass(value, Budget) else ""
    if isinstance(value, (int, float)):
        hint = f" A constant limit is Fixed({value})."
    raise TypeError(
        f"{call}(budget=…): expected a budget, a name or a mapping from levels to them, got {value!r}.{hint}"
    )
