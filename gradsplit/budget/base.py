"""A budget: a rule that yields limits from norms and history, as pure functions of arrays.

Every budget is a frozen record of its constants with three pure functions through `xp` (one text for all frameworks):
`init` makes the history, `limits` reads it, and `learn` returns the next one. Each array has one entry per node.

A budget may also describe itself, so that no caller has to know its class. `line` says that its limit needs the bin
alone, `constant` that its limit never changes, and `check` which number of nodes it fits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from ..xp import Array, namespace

__all__ = ["Budget", "Line", "Reading", "State", "limits_after", "limits_of"]

State = tuple[Array, ...]
"""The history of a budget: arrays of shape (n,)."""


class Reading(NamedTuple):
    """What one step shows a budget of its n nodes.

    Attributes:
        norm: (n,) L2 norm of the gradient (or of the update), without what was not finite.
        weight_norm: (n,) L2 norm of the weights, if a budget of this plan reads it.
        numel: (n,) number of elements.
        num_rows: (n,) number of matrix rows; a fraction where a node holds only some columns of a row; a vector has
            none.
        pace: (n,) learning rate now / largest learning rate so far, in [0, 1]; 1 without an optimizer.
    """

    norm: Array
    weight_norm: Array | None
    numel: Array
    num_rows: Array
    pace: Array


class Line(NamedTuple):
    """A limit that needs the bin alone, in numbers that a compiled loop evaluates while the bin is in cache.

        limit_b = max(slope ||W_b||, floor + max(root sqrt(n_b), row sqrt(rows_b)))

    The bin has n_b elements in rows_b matrix rows (see `Reading`). Where ``bounds_update`` is set, the limit is a
    length of the update; kernels multiply it by the pace, and divide it by the update's length per length of gradient.
    """

    slope: float = 0.0
    floor: float = 0.0
    root: float = 0.0
    row: float = 0.0
    bounds_update: bool = False


_DESCRIPTIONS = ("line", "constant")
"""The methods that describe `Budget.limits` to compiled loops. They are true for the class that defines them, and may
be wrong in a subclass that changes how limits are made."""


@dataclass(frozen=True)
class Budget:
    """The base of all budgets.

    A subclass defines `limits`, and `init` and `learn` if it has a history. It may define `line` and `constant`, which
    describe its limits to compiled loops. A further subclass that changes a method of such a budget does not inherit
    its `line` and `constant`: they describe the old limits, so they are taken back until it defines its own.

    Attributes:
        name: what users write as ``budget="name"``.
        reads_norms: whether limits or history depend on the norms. If False, norms of nodes above the bins are not
            computed, and the budget is shown ones in their place.
        reads_weights: whether limits depend on the norms of the weights.
        bounds_update: whether limits are lengths of the *update*, in units of the weights, and not of the gradient.
    """

    name: ClassVar[str]
    reads_norms: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False
    bounds_update: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in _DESCRIPTIONS:
            for kind, *bases in (cls.__mro__[i:] for i in range(len(cls.__mro__))):
                if name in vars(kind):
                    break
                if _changes_a_method(kind, bases):
                    setattr(cls, name, vars(Budget)[name])
                    break

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if "Tracer" in type(value).__name__:  # of jax, under optax.inject_hyperparams
                raise TypeError(
                    f"{type(self).__name__}({one.name}=…): expected a number, got one that is traced by jit. A "
                    "budget's constants are part of the compiled step, so inject the learning rate instead."
                )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and not hasattr(value, "__array__") and one.type in ("float", "int"):
                raise TypeError(
                    f"{type(self).__name__}({one.name}={value!r}): expected a number, got {type(value).__name__}. "
                    f"Leave {one.name} out for its default."
                )
            if number and one.type == "int" and value != int(value):
                raise ValueError(
                    f"{type(self).__name__}({one.name}={value!r}): expected a whole number. Write {one.name}="
                    f"{max(1, round(value))}."
                )

    def init(self, xp: ModuleType, like: Array) -> State:
        """Return the history before the first step, for nodes shaped like ``like``."""
        return ()

    def restored(self, xp: ModuleType, saved: State) -> State:
        """Return the history that a saved one stands for, which an older version may have kept in fewer arrays."""
        return saved

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:
        """Return the largest norm each node may keep, shape (n,); inf = unbounded."""
        raise TypeError(
            f"{type(self).__name__}: expected a budget that defines limits(xp, reading, state). Write it in the class."
        )

    def learn(self, xp: ModuleType, reading: Reading, kept: Array, state: State) -> State:
        """Return the next history from ``kept``, (n,) norms that were let through; 0 is no observation."""
        return state

    def line(self) -> Line | None:
        """Return the limit as a function of the bin alone; None where it looks at other bins or at the past."""
        return None

    def constant(self) -> Any:
        """Return the limit where it depends on nothing: one number, or one per node; None where it varies."""
        return None

    def check(self, num: int) -> str:
        """Say what this budget expects of a level, if a level of ``num`` nodes does not fit it; else return ""."""
        return ""

    def _check(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            call = f"{type(self).__name__}({name}={getattr(self, name)!r})"
            raise ValueError(f"{call}: expected {rule}.")


def _changes_a_method(kind: type, bases: list[type]) -> bool:
    """Whether a class overrides a method of the bases that limits may depend on."""
    return any(
        (callable(value) or isinstance(value, classmethod)) and any(name in vars(base) for base in bases)
        for name, value in vars(kind).items()
        if not name.startswith("__") and name not in (*_DESCRIPTIONS, "check")
    )


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


def limits_after(budget: Budget, norms: list[Array], *, norm: Array | None = None) -> Array:
    """Return the limits that a budget sets after a history of norms, for ``norm`` or for the last one again."""
    xp = namespace(norms[0])
    state, ones = budget.init(xp, norms[0]), xp.full(norms[0].shape[0], 1.0, norms[0])
    none = xp.full(norms[0].shape[0], 0.0, norms[0])
    for seen in norms:
        reading = Reading(seen, None, ones, none, ones)
        state = budget.learn(xp, reading, xp.minimum(seen, budget.limits(xp, reading, state)), state)
    return limits_of(budget, norm=norms[-1] if norm is None else norm, state=state)
