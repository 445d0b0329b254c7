"""The strategies by name, one row each; the rows parametrise tests, the command line and the table in the guide.

The row of `tree_sp` is in its own module, since its ``inner=`` may be the name of another row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .layout import Layout
from .lbf import lbf
from .plan import Plan
from .slices import per_tensor, whole, xsp

__all__ = ["STRATEGIES", "Strategy", "make_plan", "register", "strategy_named"]


@dataclass(frozen=True)
class Strategy:
    """A named way from a layout to a plan.

    Attributes:
        name: what users write as ``plan="name"``.
        make: ``layout -> plan``, or ``(layout, energy) -> plan`` where ``needs_energy``.
        needs_energy: the cuts follow calibrated energies.
        summary: one line for tables.
    """

    name: str
    make: Callable[..., Plan]
    summary: str
    needs_energy: bool = False


STRATEGIES: dict[str, Strategy] = {
    row.name: row
    for row in (
        Strategy("whole", whole, "everything in one bin: a global clip"),
        Strategy("per_tensor", per_tensor, "one bin per tensor"),
        Strategy("xsp", xsp, "slices along the x axis, one per row by default; the other axis is free"),
        Strategy("lbf", lbf, "best-first rectangles from calibrated energies; both axes", needs_energy=True),
    )
}


def register(row: Strategy) -> Strategy:
    """Add a strategy to `STRATEGIES`, so that ``plan="its name"`` finds it; return the row.

    Args:
        row: its ``make`` is a function of a layout, or of a layout and energies (see `Strategy`).

    Raises:
        TypeError: something that is not a `Strategy`.
        ValueError: a name that another strategy has.

    >>> row = register(Strategy("halves", lambda layout: xsp(layout, parts=2), "two slices per tensor"))
    >>> make_plan("halves", Layout.from_shapes({"w": (4, 3)}), call="f").num_bins
    2
    >>> del STRATEGIES["halves"]
    """
    if not isinstance(row, Strategy):
        raise TypeError(f"register({row!r}): expected a Strategy(name, make, summary).")
    other = STRATEGIES.get(row.name, row)
    if (other.make.__module__, other.make.__qualname__) != (row.make.__module__, row.make.__qualname__):
        raise ValueError(
            f"register(Strategy({row.name!r}, …)): expected a name that no strategy has, got that of "
            f"{other.make.__module__}.{other.make.__qualname__}. Choose another name."
        )
    STRATEGIES[row.name] = row
    return row


def strategy_named(name: str, *, call: str) -> Strategy:
    """Return the row of a name.

    Raises:
        ValueError: unknown name; offers the nearest.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    near = difflib.get_close_matches(str(name), STRATEGIES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{call}: expected one of {', '.join(STRATEGIES)}, got {name!r}.{hint}")


def make_plan(
    plan: Plan | str | Callable[[Layout], Plan],
    layout: Layout,
    energy: Mapping[str, Any] | None = None,
    *,
    call: str,
) -> Plan:
    """Return the plan for a layout from a plan, a strategy's name or a function ``layout -> plan``.

    A strategy that needs energies starts from one bin per tensor until there are energies.

    Raises:
        ValueError: unknown name, or a plan of another layout.
        TypeError: something else.
    """
    if isinstance(plan, str):
        row = strategy_named(plan, call=f"{call}(plan={plan!r})")
        if not row.needs_energy:
            return row.make(layout)
        return per_tensor(layout) if energy is None else row.make(layout, energy, max_bins=max(256, 2 * len(layout)))
    if isinstance(plan, Plan):
        made = plan
    elif callable(plan):
        made = plan(layout)
        if not isinstance(made, Plan):
            raise TypeError(
                f"{call}(plan=…): expected a function that returns a Plan, got {type(made).__name__} from "
                f"{getattr(plan, '__name__', plan)!r}. Write for example lambda layout: gradsplit.xsp(layout, parts=8)."
            )
    else:
        raise TypeError(
            f"{call}(plan=…): expected a Plan, a strategy's name or a function, got {type(plan).__name__}. Write for "
            "example plan='xsp'."
        )
    if made.layout.fingerprint != layout.fingerprint:
        raise ValueError(
            f"{call}(plan=…): expected a plan of this model ({len(layout)} tensors, layout {layout.fingerprint}), "
            f"got one of another ({len(made.layout)} tensors, layout {made.layout.fingerprint}; "
            f"{_first_difference(layout, made.layout)}). Make the plan from layout_of(model), or "
            "pass a function of the layout, as in plan=gradsplit.per_tensor; GSO sees stacked matrices as their rows."
        )
    return made


def _first_difference(ours: Layout, theirs: Layout) -> str:
    for a, b, s, u in zip(ours.names, theirs.names, ours.shapes, theirs.shapes, strict=False):
        if (a, s) != (b, u):
            return f"first difference: {a!r} {s} here, {b!r} {u} there"
    return "one has more tensors"
