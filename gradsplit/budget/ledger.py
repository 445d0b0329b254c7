"""The ledger: a plan's budgets at all levels with their history, and the decision of one step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace
from .base import Budget, Reading, State
from .decision import Decision, begin, decide, terms_of
from .fixed import Fixed
from .projection import bin_scales
from .sums import Nodes, sums_for

__all__ = ["Ledger", "warn_of_idle_limits", "StagedLedger", "make_ledger"]


class Ledger:
    """Budgets over a plan, with history; one decision a step.

    Args:
        plan: what is bounded.
        budgets: (level, budget) pairs, from `budgets_by_level`.
        like: an array of the namespace, dtype and device in which to compute.
        rule: "bottom_up" or "nearest".
        call: the caller's name, for errors.

    Raises:
        ValueError: a limit of the wrong shape, an unknown rule.

    Warns:
        UserWarning: a node whose constant limit can never bind.
    """

    def __init__(
        self,
        plan: Plan,
        budgets: list[tuple[str, Budget]],
        like: Array,
        *,
        rule: str = "bottom_up",
        call: str = "Ledger",
    ) -> None:
        self.plan, self.rule = plan, rule
        self.terms = terms_of(plan, budgets, like, rule=rule, call=call)
        self.history = begin(self.terms, like)
        self.numel_B = namespace(like).asarray(plan.numel_B, like)
        self.reads_weights = any(budget.reads_weights for _, budget in budgets)
        self._keys = [f"{term.level}/{term.budget.name}/{i}" for i, term in enumerate(self.terms)]
        if any(term.ids is not None for term in self.terms):
            # A decision on nothing changes nothing, but makes the plan's tables now, outside of any graph that a step
            # may be traced into.
            nothing = namespace(like).full(plan.num_bins, 0.0, like)
            decide(plan, self.terms, self.history, nothing, nothing, rule=rule)
        warn_of_idle_limits(plan, budgets, call)

    def decide(
        self,
        squares_B: Array,
        weight_squares_B: Array | None = None,
        pace_B: Array | None = None,
        reach_B: Array | None = None,
    ) -> Decision:
        """Return the decision for one step and enter it into the history.

        Args:
            squares_B: (B,) sums of squares; not finite where an entry was not.
            weight_squares_B: (B,) sums of squares of the weights, if a budget reads them.
            pace_B: (B,) learning rate / largest so far; None: 1.
            reach_B: (B,) length of the update per length of gradient, for budgets that bound the update; None: 1.
        """
        amounts = sums_for(squares_B).of_squares
        weights = None if weight_squares_B is None else amounts(weight_squares_B)
        decision, self.history = decide(
            self.plan, self.terms, self.history, amounts(squares_B), weights, pace_B, reach_B, rule=self.rule
        )
        return decision

    def state_dict(self) -> dict[str, list[Array]]:
        """Return the history: ``{"level/budget/position": arrays}``."""
        return {key: list(self.history[i]) for i, key in enumerate(self._keys) if self.history[i]}

    def load_state_dict(self, state: Mapping[str, Any], *, call: str) -> None:
        """Take a history over; nothing is taken unless all of it fits.

        Raises:
            ValueError: other budgets, a vector of another length, or one with a value that no history has.
        """
        wanted = {key: self.history[i] for i, key in enumerate(self._keys) if self.history[i]}
        if not isinstance(state, Mapping) or set(wanted) != set(state):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"{call}: expected the history of budgets {sorted(wanted)}, got {got}. Use the budgets of the saved "
                "run, or start their history anew by leaving the state out."
            )
        fresh: dict[str, State] = {}
        budgets = {key: term.budget for key, term in zip(self._keys, self.terms, strict=True)}
        for key, old in wanted.items():
            xp = namespace(old[0])
            try:
                new = budgets[key].restored(xp, tuple(xp.asarray(array, old[0]) for array in state[key]))
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(
                    f"{call}: expected {len(old)} vectors of numbers at {key!r}, got {type(state[key]).__name__} "
                    f"({error}). Load what state_dict() returned."
                ) from None
            if [tuple(a.shape) for a in new] != [tuple(a.shape) for a in old]:
                shapes = [tuple(a.shape) for a in new]
                raise ValueError(
                    f"{call}: expected vectors of shape {tuple(old[0].shape)} at {key!r}, got {shapes}. That is the "
                    "history of another plan: use the plan of the saved run."
                )
            if not all(_is_history(array) for array in new):
                raise ValueError(
                    f"{call}: expected a history of finite numbers >= 0 at {key!r}, got others. The state is damaged: "
                    "load another, or start the history anew."
                )
            fresh[key] = tuple(array + like * 0.0 for array, like in zip(new, old, strict=True))
        self.history = tuple(fresh.get(key, ()) for key in self._keys)


def _placed(budget: Budget, saved: Sequence[Any], held: State) -> State:
    """A saved history beside the one that is held."""
    xp = namespace(held[0])
    arrays = budget.restored(xp, tuple(xp.asarray(new, held[0]) for new in saved))
    return tuple(xp.asarray(new, old) for new, old in zip(arrays, held, strict=True))


def _is_history(array: Array) -> bool:
    """Whether all entries are finite and >= 0, as every budget's history is."""
    xp, num = namespace(array), array.shape[0]
    wrong = xp.where(xp.isfinite(array) & (array >= 0), xp.full(num, 0.0, array), xp.full(num, 1.0, array))
    return float(xp.cumsum(wrong)[-1]) == 0.0


def warn_of_idle_limits(plan: Plan, budgets: list[tuple[str, Budget]], call: str) -> None:
    """Warn of the first node whose squared limit is at least the sum of its children's squared limits."""
    constants = [budget.constant() for _, budget in budgets]
    if all(level == "bin" for level, _ in budgets) or any(constant is None for constant in constants):
        return
    limit_N = np.full(plan.num_nodes, np.inf)
    for (level, _), constant in zip(budgets, constants, strict=True):
        ids = plan.level_nodes(level)
        limit_N[ids] = np.minimum(limit_N[ids], np.asarray(constant, dtype=np.float64))
    reach2_N = limit_N**2  # the largest squared norm that can arrive at a node from below
    for lo, hi in reversed(Nodes.of(plan, limit_N).depths[1:]):
        parents = plan.parents_N[lo:hi]
        sums = np.bincount(parents, weights=reach2_N[lo:hi], minlength=plan.num_nodes)
        for node in np.unique(parents):
            if np.isfinite(limit_N[node]) and limit_N[node] ** 2 >= sums[node] * (1 - 1e-12):
                warnings.warn(
                    f"{call}(budget=…): the limit {limit_N[node]:g} of {plan.nodes[int(node)].name!r} can never bind, "
                    f"since its children keep at most {np.sqrt(sums[node]):g} together. Lower it, or leave it out.",
                    UserWarning,
                    stacklevel=4,
                )
                return
            reach2_N[node] = min(reach2_N[node], sums[node])


def make_ledger(
    plan: Plan,
    budgets: list[tuple[str, Budget]],
    like: Array,
    *,
    rule: str = "bottom_up",
    call: str = "Ledger",
    add: Callable[[Array], Array] | None = None,
) -> Ledger | StagedLedger:
    """Return a `Ledger`; a `StagedLedger` where ``add`` adds over stages and a budget bounds the root.

    Raises:
        ValueError: the rule "nearest" over stages.
    """
    if add is None or not any(level == "root" for level, _ in budgets):
        return Ledger(plan, budgets, like, rule=rule, call=call)
    if rule != "bottom_up":
        raise ValueError(
            f"{call}(rule={rule!r}, stages=…): expected rule='bottom_up' for a limit at the root over stages, since "
            "the nearest point needs every bin of every stage. Leave rule= out, or the limit at the root."
        )
    return StagedLedger(plan, budgets, like, call=call, add=add)


class StagedLedger:
    """A ledger whose root is the sum of the stages' roots; the interface is that of `Ledger`.

        f = min(1, limit / sqrt(sum over stages of what each kept below its root^2));    scale_B <- f scale_B

    Args:
        plan, budgets, like, call: see `Ledger`.
        add: adds a vector over the stages, each counted once.
    """

    def __init__(
        self, plan: Plan, budgets: list[tuple[str, Budget]], like: Array, *, call: str, add: Callable[[Array], Array]
    ) -> None:
        below = [pair for pair in budgets if pair[0] != "root"] or [("bin", Fixed(float("inf")))]
        self.below = Ledger(plan, below, like, call=call)
        xp = namespace(like)
        zero = xp.full(1, 0.0, like)
        self._roots: list[tuple[Budget, State]] = [(b, b.init(xp, zero)) for level, b in budgets if level == "root"]
        self.plan, self.rule, self.numel_B, self._add = plan, "bottom_up", self.below.numel_B, add
        self.reads_weights = any(budget.reads_weights for _, budget in budgets)

    def decide(
        self,
        squares_B: Array,
        weight_squares_B: Array | None = None,
        pace_B: Array | None = None,
        reach_B: Array | None = None,
    ) -> Decision:
        """See `Ledger.decide`; every stage takes part, with whatever gradients it has."""
        xp = namespace(squares_B)
        made = self.below.decide(squares_B, weight_squares_B, pace_B, reach_B)
        zero, ones = xp.full(self.plan.num_bins, 0.0, squares_B), xp.full(self.plan.num_bins, 1.0, squares_B)
        weights = zero if weight_squares_B is None else xp.where(xp.isfinite(weight_squares_B), weight_squares_B, zero)
        pace, reach = (self.numel_B * (ones if rate_B is None else rate_B) for rate_B in (pace_B, reach_B))
        rows_B = xp.asarray(self.plan.num_rows_B, squares_B)
        columns = (made.norm_B**2, (made.norm_B * made.scale_B) ** 2, weights, self.numel_B, rows_B, pace, reach)
        sums = self._add(xp.concatenate([xp.cumsum(column)[-1:] for column in columns]))
        each = (sums[i : i + 1] for i in range(len(columns)))
        square, kept_square, weight_square, numel, num_rows, pace_sum, reach_sum = each
        weight_norm = None if weight_squares_B is None else xp.sqrt(weight_square)
        reading = Reading(xp.sqrt(square), weight_norm, numel, num_rows, pace_sum / numel)
        limits, kept = [], xp.sqrt(kept_square)
        for budget, state in self._roots:
            limit = budget.limits(xp, reading, state)
            limits.append(limit / (reach_sum / numel) if budget.bounds_update and reach_B is not None else limit)
        least = limits[0]
        for limit in limits[1:]:
            least = xp.minimum(least, limit)
        factor = bin_scales(kept, least)
        self._roots = [
            (budget, budget.learn(xp, reading, kept * factor, state) if state else state)
            for budget, state in self._roots
        ]
        root = xp.index(self.plan.level_nodes("root"), squares_B)
        every = (*made.limits, *(("root", root, limit) for limit in limits))
        return Decision(self.plan, made.norm_B, made.finite_B, made.scale_B * factor, every)

    def state_dict(self) -> dict[str, list[Array]]:
        """See `Ledger.state_dict`; the history of the root is the same on every stage."""
        return {**self.below.state_dict(), **{key: list(state) for key, state in self._keyed().items()}}

    def load_state_dict(self, state: Mapping[str, Any], *, call: str) -> None:
        """See `Ledger.load_state_dict`."""
        wanted = self._keyed()
        if not set(wanted) <= set(state):
            raise ValueError(
                f"{call}: expected the history of budgets {sorted(wanted)} over all stages, got {sorted(state)}. Use "
                "the budgets of the saved run, and stages= as there."
            )
        self.below.load_state_dict({key: value for key, value in state.items() if key not in wanted}, call=call)
        self._roots = [
            (budget, _placed(budget, state[key], held)) if held else (budget, held)
            for (budget, held), key in zip(self._roots, self._keys(), strict=True)
        ]

    @property
    def history(self) -> tuple[Any, ...]:
        """See `Ledger`; the histories below the root, then those of the root."""
        return (self.below.history, tuple(state for _, state in self._roots))

    @history.setter
    def history(self, history: tuple[Any, ...]) -> None:
        self.below.history, roots = history
        self._roots = [(budget, state) for (budget, _), state in zip(self._roots, roots, strict=True)]

    def _keys(self) -> list[str]:
        return [f"root over stages/{budget.name}/{i}" for i, (budget, _) in enumerate(self._roots)]

    def _keyed(self) -> dict[str, State]:
        return {key: state for key, (_, state) in zip(self._keys(), self._roots, strict=True) if state}
