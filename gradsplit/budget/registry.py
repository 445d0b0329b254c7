"""The budgets by name, and how a ``budget=`` argument becomes a list of (level, budget)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from ..plan import LEVELS, Plan
from .base import Budget
from .ema import Ema
from .fixed import Fixed
from .percentile import Percentile
from .relative import Relative
from .relative_step import RelativeStep
from .running_median import RunningMedian
from .zscore import ZScore

__all__ = ["BUDGETS", "DEFAULT_IN_FRONT", "DEFAULT_OF_GSO", "DEFAULT_OF_SPLITTER", "budgets_by_level", "register"]

BUDGETS: dict[str, type[Budget]] = {
    row.name: row for row in (RelativeStep, Fixed, Relative, Ema, ZScore, Percentile, RunningMedian)
}
"""One row per budget, by the name that users write. `register` adds a row from outside the package."""

_Kind = TypeVar("_Kind", bound=type[Budget])


def register(kind: _Kind) -> _Kind:
    """Add a budget to `BUDGETS`, so that ``budget="its name"`` finds it; return the class, as a decorator does.

    Args:
        kind: a subclass of `Budget` with a ``name``, whose fields all have defaults.

    Raises:
        TypeError: something that is not a subclass of `Budget`.
        ValueError: a class without a name, a name that another budget has, or a field without a default.

    >>> from dataclasses import dataclass
    >>> @register
    ... @dataclass(frozen=True)
    ... class Halved(Fixed):
    ...     name = "halved"
    ...     def limits(self, xp, reading, state):
    ...         return super().limits(xp, reading, state) / 2
    >>> BUDGETS.pop("halved")() == Halved(limit=1.0)
    True
    """
    if not (isinstance(kind, type) and issubclass(kind, Budget)):
        raise TypeError(f"register({kind!r}): expected a subclass of Budget. Derive it from gradsplit.budget.Budget.")
    name = getattr(kind, "name", "")
    if not isinstance(name, str) or not name:
        raise ValueError(f"register({kind.__name__}): expected a name. Write name = '…' in the class.")
    other = BUDGETS.get(name, kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):  # a class may be defined anew
        raise ValueError(
            f"register({kind.__name__}): expected a name that no budget has, got {name!r}, which is "
            f"{other.__name__}. Choose another name."
        )
    bare = [one.name for one in dataclasses.fields(kind) if one.default is one.default_factory is dataclasses.MISSING]
    if bare:
        raise ValueError(
            f"register({kind.__name__}): expected a default for every field, since a name alone makes the budget, got "
            f"none for {bare[0]!r}. Write {bare[0]}: float = … in the class."
        )
    BUDGETS[name] = kind
    return kind


DEFAULT_OF_GSO = (Relative(0.2), RelativeStep(0.03))
"""The first bounds the gradient before the moments, since one huge gradient would poison them for thousands of steps.
The second bounds the update."""

DEFAULT_OF_SPLITTER = RelativeStep(0.03, length=1.0)
"""In front of SGD. Under Adam-like updates, which fill every limit, a length of 1 is too much for short rows."""


DEFAULT_IN_FRONT = Relative(1.0)
"""In front of optimizers that rescale gradients by themselves, together with the collective rule. It keeps a fault in
its row and out of the optimizer's memory; it does not bound the step. A factor of 0.2 also bounds rows of healthy runs,
which costs some optimizers more than a change of the seed does."""


def budgets_by_level(budget: Any, plan: Plan, *, call: str) -> list[tuple[str, Budget]]:
    """Return (level, budget) pairs from a budget, a name, a tuple of them, or a mapping from levels to these.

    Without a level a budget bounds the bins.

    Raises:
        ValueError: an unknown budget or level, a level the plan does not have, an empty mapping.
        TypeError: something that is not a budget.

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
                "without. The module tree comes with tree_sp(layout, inner=…)."
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
