"""Splitting the gradient in front of any optax optimizer, and capping the update behind one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import Array
from jax import numpy as jnp

from ...budget import DEFAULT_IN_FRONT, DEFAULT_OF_SPLITTER, RelativeStep
from ...functional import Splitting, splitting
from ...plan import Layout, Plan
from .transformation import LastStep, Rate, SplitTransformation, rate_now
from .trees import Planner, leaves_of

__all__ = ["SplitState", "cap_updates", "split_gradients"]


class SplitState(NamedTuple):
    """What the next step depends on, and the last decision.

    Attributes:
        num_steps: steps made.
        top: largest learning rate so far; 0 without one.
        history: per budget its arrays.
        last: the last decision, see `SplitTransformation.record`.
    """

    num_steps: Array
    top: Array
    history: Any
    last: LastStep


def split_gradients(
    plan: Plan | str | Callable[[Layout], Plan] = "xsp",
    budget: Any = None,
    *,
    rule: str = "bottom_up",
    learning_rate: Rate = None,
    momentum: float = 0.0,
    orientation: Any = "last",
    collective: bool | None = None,
) -> SplitTransformation:
    """Bound each bin of a gradient by a budget of its own; the first link of a chain.

    gradients -> norms -> limits -> scales in [0, 1] -> scaled gradients, inside the compiled step. A bin with an inf
    or NaN is set to zero. The same plans, budgets and numbers as `gradsplit.GradientSplitter`.

    Args:
        plan: a Plan of `layout_of(params)`, a strategy's name, or a function layout -> plan.
        budget: a budget, its name, a tuple, or a mapping from levels. The default fits the optimizer behind: with the
            ``learning_rate`` of an SGD ``RelativeStep(0.03, length=1.0)``, which bounds the step; without, in front of
            Adam, Muon and all others, ``Relative(1.0)`` with the collective rule, which keeps faults out of their
            memories.
        rule: "bottom_up" or "nearest", see `gradsplit.project`.
        learning_rate: of the SGD behind, a float or schedule; needed by `RelativeStep`.
        momentum: of the optimizer behind, in [0, 1); a limit met at every step then holds for the momentum's sum.
        orientation: which axes count output units (rows). "last": kernels are (in, out) and (height, width, in, out),
            but rows of arrays named ``embedding`` are tokens; "first": (out, in), as in Equinox; or a mapping from
            name patterns to an axis or axes, ``{"*.query.kernel": (1, 2)}``, before "last".
        collective: divide the whole gradient where all bins are scaled together, see `gradsplit.collective`; None:
            where the default in front of an optimizer other than SGD is used.

    Raises:
        ValueError: RelativeStep without a learning rate, a momentum outside [0, 1), an unknown name; from ``update``,
            a budget that reads weights without ``params``.

    >>> import numpy as np
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> split = split_gradients("xsp", "fixed")              # each output unit's gradient at most 1 long
    >>> gradients = {"kernel": jnp.asarray([[30.0, 0.3], [40.0, 0.4]])}
    >>> bounded, state = split.update(gradients, split.init(params))
    >>> print(np.asarray(bounded["kernel"]).round(4))
    [[0.6 0.3]
     [0.8 0.4]]
    >>> split.record(state, params).worst(1)[0].name
    'kernel[0:1]'
    """
    call = "split_gradients"
    given: Any = momentum  # traced under optax.inject_hyperparams
    if not isinstance(given, jax.core.Tracer) and not 0 <= given < 1:
        raise ValueError(f"{call}(momentum={momentum!r}): expected a number in [0, 1).")

    in_front = budget is None and learning_rate is None
    usual = DEFAULT_IN_FRONT if in_front else DEFAULT_OF_SPLITTER
    together = in_front if collective is None else collective

    def make(made: Plan, oriented: Any) -> Splitting:
        chosen = usual if budget is None else budget
        split = splitting(made, chosen, oriented=oriented, rule=rule, collective=together, call=call)
        if split.bounds_update and learning_rate is None:
            raise ValueError(
                f"{call}(learning_rate=None): expected a learning rate, since RelativeStep bounds the step. Pass that "
                "of the SGD behind and its momentum=; in front of Adam and its like leave budget= out for the default "
                "that fits, or use cap_updates behind it, or gso instead."
            )
        return split

    def reach(lr: Array) -> Array:
        return jnp.maximum(lr, 1e-30) / (1.0 - momentum)

    planner = Planner(plan, orientation, make, call=call)
    return _transformation(planner, learning_rate, reach)


def cap_updates(
    plan: Plan | str | Callable[[Layout], Plan] = "xsp",
    budget: Any = None,
    *,
    rule: str = "bottom_up",
    learning_rate: Rate = None,
    orientation: Any = "last",
) -> SplitTransformation:
    """Bound each bin of the update that any optimizer made; the last link of a chain.

    By default no row moves by more than 3 % of its own length per step, whatever made the update. Unlike in PyTorch
    this takes no copy of the weights, since optax hands the update on before it is applied. Decoupled weight decay is
    part of what is bounded; `gso` bounds the update apart from it.

    Args:
        plan: see `split_gradients`.
        budget: limits on the length of the update, in units of the weights; default `RelativeStep()`.
        rule: "bottom_up" or "nearest".
        learning_rate: the optimizer's, if the cap is to follow its schedule.
        orientation: see `split_gradients`.

    Raises:
        ValueError: an unknown name; from ``update``, a budget that reads weights without ``params``.

    >>> import numpy as np
    >>> capped = cap_updates()
    >>> params = {"kernel": jnp.asarray([[3.0], [4.0]])}                      # one row of length 5
    >>> updates, _ = capped.update({"kernel": jnp.asarray([[-9.0], [0.0]])}, capped.init(params), params)
    >>> print(np.asarray(updates["kernel"]).ravel().round(4))
    [-0.15  0.  ]
    """
    call = "cap_updates"

    def make(made: Plan, oriented: Any) -> Splitting:
        return splitting(made, RelativeStep() if budget is None else budget, oriented=oriented, rule=rule, call=call)

    return _transformation(Planner(plan, orientation, make, call=call), learning_rate, None)


def _transformation(
    planner: Planner, learning_rate: Rate, reach_of: Callable[[Array], Array] | None
) -> SplitTransformation:
    call = planner.call

    def init(params: Any) -> SplitState:
        leaves = leaves_of(params, call=call)
        plan, split = planner.of(leaves)
        zero = jnp.zeros((), jnp.float32)
        return SplitState(
            jnp.zeros((), jnp.int32), zero, split.init(leaves.arrays), LastStep.before(plan.num_bins, leaves.arrays)
        )

    def update(updates: Any, state: SplitState, params: Any = None, **extra: Any) -> tuple[Any, SplitState]:
        leaves = leaves_of(updates, call=call)
        _, split = planner.of(leaves)
        if split.reads_weights and params is None:
            raise ValueError(
                f"{call}(…).update(updates, state): expected the parameters too, since the limits depend on them. Call "
                "update(updates, state, params)."
            )
        weights = planner.weights(params, leaves) if split.reads_weights else None
        top, pace, reach = state.top, None, None
        if learning_rate is not None:
            lr, top, pace = rate_now(learning_rate, state.num_steps, state.top)
            reach = None if reach_of is None else reach_of(lr)
        bounded, history, decision = split.update(leaves.arrays, state.history, weights, pace, reach)
        return leaves.back(bounded), SplitState(
            optax.safe_increment(state.num_steps), top, history, LastStep.of(decision)
        )

    return SplitTransformation.made(init, update, planner)
