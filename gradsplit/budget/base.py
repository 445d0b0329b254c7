"""A budget: a rule that yields limits from norms and history, as pure functions of arrays.

Every budget is a frozen record of its constants with three pure functions through `xp` (one text for all frameworks):
`init` makes the history, `limits` reads it, `learn` returns the next one. One entry a node.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType
from typing import ClassVar, NamedTuple

from ..xp import Array, namespace

__all__ = ["Budget", "Reading", "State", "limits_after", "limits_of"]

State = tuple[Array, ...]
"""A budget's history: arrays of shape (n,)."""


class Reading(NamedTuple):
    """What one step shows a budget of its n nodes.

    Attributes:
        norm: (n,) L2 norm of the gradient (or of the update), without what was not finite.
        weight_norm: (n,) L2 norm of the weights, if a budget of this plan reads it.
        numel: (n,) elements.
        num_rows: (n,) rows of matrices, as a share where a node holds a part of a row; vectors have none.
        pace: (n,) learning rate now / largest learning rate so far, in [0, 1]; 1 without an optimizer.
    """

    norm: Array
    weight_norm: Array | None
    numel: Array
    num_rows: Array
    pace: Array


@dataclass(frozen=True)
class Budget:
    """Base of all budgets.

    Attributes:
        name: what users write as ``budget="name"``.
        reads_norms: limits or history depend on the norms; False spares their sums over the nodes above the bins, for
            which ones stand then.
        reads_weights: limits depend on the norms of the weights.
        bounds_update: limits are lengths of the *update*, in units of the weights, not of the gradient.
    """

    name: ClassVar[str]
    reads_norms: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False
    bounds_update: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and not hasattr(value, "__array__") and one.type in ("float", "int"):
                raise TypeError(
                    f"{type(self).__name__}({one.name}={value!r}): expected a number, got {type(value).__name__}. "
                    f"Leave {one.name} out for its default."
                )

    def init(self, xp: ModuleType, like: Array) -> State:
        """Return the history before the first step, for nodes shaped like ``like``."""
        return ()

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:
        """Return the largest norm each node may keep, shape (n,); inf = unbounded."""
        raise TypeError(f"{type(self).__name__}: expected a budget that defines limits(xp, reading, state).")

    def learn(self, xp: ModuleType, reading: Reading, kept: Array, state: State) -> State:
        """Return the next history from ``kept``, (n,) norms that were let through; 0 is no observation."""
        return state

    def _check(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            call = f"{type(self).__name__}({name}={getattr(self, name)!r})"
            raise ValueError(f"{call}: expected {rule}.")


def limits_of(
    budget: Budget,
    *,
    norm: Array,
    weight_norm: Array | None = None,
    numel: Array | None = None,
    num_rows: Array | None = None,
    state: State | None = None,
) -> Array:
    """Return the limits (n,) that a budget sets for norms (n,), at its beginning or after a given history."""
    xp = namespace(norm)
    ones, none = xp.full(norm.shape[0], 1.0, norm), xp.full(norm.shape[0], 0.0, norm)
    sizes = (ones if numel is None else numel, none if num_rows is None else num_rows)
    reading = Reading(norm, weight_norm, *sizes, ones)
    return budget.limits(xp, reading, budget.init(xp, norm) if state is None else state)


def limits_after(
    budget: Budget, norms: list[Array], *, norm: Array | None = None, weight_norm: Array | None = None
) -> Array:
    """Return the limits that a budget sets after a history of norms, for ``norm`` or for the last one again."""
    xp = namespace(norms[0])
    state, ones = budget.init(xp, norms[0]), xp.full(norms[0].shape[0], 1.0, norms[0])
    none = xp.full(norms[0].shape[0], 0.0, norms[0])
    for seen in norms:
        reading = Reading(seen, weight_norm, ones, none, ones)
        state = budget.learn(xp, reading, xp.minimum(seen, budget.limits(xp, reading, state)), state)
    return limits_of(budget, norm=norms[-1] if norm is None else norm, weight_norm=weight_norm, state=state)
