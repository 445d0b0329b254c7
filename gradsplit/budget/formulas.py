"""Budgets of the bins and of the root as text, so that a program on a GPU decides in a few launches.

Limits and history of every budget are pure functions through `xp`. `formula_of` calls them once with names in the place
of arrays, see `gradsplit.xp.text_xp`, whoever wrote the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..xp import text_xp as xp
from .base import Reading, State
from .decision import Term

__all__ = ["Formula", "Part", "formula_of"]


@dataclass(frozen=True)
class Part:
    """What the budgets of one level compute, as statements.

    The names ``norm``, ``weight_norm``, ``numel``, ``num_rows``, ``pace``, ``reach`` and ``kept`` are given, the state
    vectors ``s0``, ``s1``, …, and the formula's numbers ``n0``, ``n1``, ….

    Attributes:
        limits: statements; ``limit`` is the least limit.
        learn: statements for the next history.
        states: the names of the next history after them, in the order of ``s0``, ``s1``, ….
        bounds: whether there is a budget at this level at all.
    """

    limits: str
    learn: str
    states: tuple[str, ...]
    bounds: bool


@dataclass(frozen=True)
class Formula:
    """The budgets of a plan as text.

    Attributes:
        bins: the part of the bins.
        root: the part of the root.
        numbers: what ``n0``, ``n1``, … stand for.
        numel, num_rows: of the root.
        reads_weights: whether a limit depends on the norms of the weights.
    """

    bins: Part
    root: Part
    numbers: tuple[float, ...]
    numel: float
    num_rows: float
    reads_weights: bool


def formula_of(terms: tuple[Term, ...], rule: str) -> Formula | None:
    """Return the terms as text; None where one bounds other nodes, sorts, or has one constant per node.

    Args:
        terms: from `terms_of`.
        rule: how limits become scales; "bottom_up" alone can be said.

    >>> from gradsplit.budget import Fixed, terms_of
    >>> from gradsplit.plan import Layout, xsp
    >>> import numpy as np
    >>> plan = xsp(Layout.from_shapes({"w": (2, 2)}))
    >>> made = formula_of(terms_of(plan, [("bin", Fixed(0.5))], np.ones(1), rule="bottom_up", call="f"), "bottom_up")
    >>> print(made.bins.limits, made.numbers)
    limit = tl.minimum(limit, n1)
     (inf, 0.5)
    """
    if rule != "bottom_up" or any(term.level not in ("bin", "root") for term in terms):
        return None
    numbers = [float("inf")]
    try:
        parts = [_part([term for term in terms if term.level == level], numbers) for level in ("bin", "root")]
    except (xp.Unwritten, AttributeError, TypeError, ValueError):  # a function that the namespace does not have
        return None
    root = next((term for term in terms if term.level == "root"), None)
    return Formula(
        bins=parts[0],
        root=parts[1],
        numbers=tuple(numbers),
        numel=1.0 if root is None else float(root.numel[0]),
        num_rows=0.0 if root is None else float(root.num_rows[0]),
        reads_weights=any(term.budget.reads_weights for term in terms),
    )


def _part(terms: list[Term], numbers: list[float]) -> Part:
    learn = xp.Script(numbers, "c")
    text, states = "", list[str]()
    for term in terms:
        budget, num = term.budget, len(states)
        one = xp.Script(numbers, "b")
        history = _named(one, term, num)
        limit = one.name(str(budget.limits(xp, _reading(one), history)))
        if budget.bounds_update:
            limit = limit / one.name("reach")
        text += f"{one.text}limit = tl.minimum(limit, {limit})\n"
        fresh = budget.learn(xp, _reading(learn), learn.name("kept"), _named(learn, term, num)) if history else ()
        states += [str(name) for name in fresh]
    return Part(text, learn.text, tuple(states), bool(terms))


def _named(script: xp.Script, term: Term, first: int) -> State:
    """The names of a term's history."""
    scratch = xp.Script()
    num = len(term.budget.init(xp, scratch.name("norm")))
    return tuple(script.name(f"s{first + i}") for i in range(num))


def _reading(script: xp.Script) -> Reading:
    return Reading(*(script.name(name) for name in ("norm", "weight_norm", "numel", "num_rows", "pace")))
