"""GSO for optax: AdamW over bins, each bounded before the moments and in its update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jax import Array
from jax import numpy as jnp

from ...budget import DEFAULT_OF_GSO
from ...functional import GsoRule, GsoState, gso_rule
from ...plan import Layout, Plan
from .transformation import LastStep, Rate, SplitTransformation, rate_now
from .trees import Planner, leaves_of

__all__ = ["GsoOptState", "gso"]


class GsoOptState(NamedTuple):
    """What the next step depends on, and the last decision.

    Attributes:
        num_steps: steps made.
        top: largest learning rate so far.
        mu: mean gradients, a tree as the parameters.
        nu: mean squares, a tree as the parameters, or for ``second_moment="bin"`` one number per bin.
        history: of the budgets on the gradient and of those on the update.
        last: the last decision on the gradient, see `SplitTransformation.record`.
    """

    num_steps: Array
    top: Array
    mu: Any
    nu: Any
    history: Any
    last: LastStep


def gso(
    learning_rate: Rate,
    plan: Plan | str | Callable[[Layout], Plan] = "xsp",
    budget: Any = DEFAULT_OF_GSO,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    second_moment: str = "element",
    rule: str = "bottom_up",
    orientation: Any = "last",
) -> SplitTransformation:
    """AdamW over bins: no bin's gradient may poison the moments, no bin may move by more than a share of its length.

    The formulas are those of `gradsplit.GSO`. The caps follow the schedule: tau times the rate now / the largest so
    far.

    Args:
        learning_rate: >= 0; a float, an array or a schedule.
        plan: see `split_gradients`.
        budget: those that bound the update act on the update, the others on the gradient before the moments. Default
            ``(Relative(0.2), RelativeStep(0.03))``.
        b1: decay of the mean gradient, in [0, 1).
        b2: decay of the mean square, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled, per step and unit of the learning rate, >= 0; not part of what is bounded, but
            shortened with it.
        second_moment: "element", or "bin": one per bin, which saves a copy of the weights.
        rule: "bottom_up" or "nearest".
        orientation: see `split_gradients`.

    Raises:
        ValueError: a constant out of its range, an unknown name; from ``update``, no ``params``.
        TypeError: complex parameters.

    >>> optimizer = gso(1.0, weight_decay=0.0)
    >>> params = {"kernel": jnp.asarray([[3.0], [4.0]])}                      # one row of length 5
    >>> updates, _ = optimizer.update({"kernel": jnp.asarray([[1e9], [0.0]])}, optimizer.init(params), params)
    >>> print((params["kernel"] + updates["kernel"]).ravel().round(4))        # moved by at most 3 % of it
    [2.85 4.  ]
    """
    call = "gso"

    def make(made: Plan, oriented: Any) -> GsoRule:
        return gso_rule(
            made,
            budget,
            betas=(b1, b2),
            eps=eps,
            weight_decay=weight_decay,
            second_moment=second_moment,
            oriented=oriented,
            rule=rule,
            call=call,
        )

    planner = Planner(plan, orientation, make, call=call)
    by_bin = second_moment == "bin"

    def init(params: Any) -> GsoOptState:
        leaves = leaves_of(params, call=call)
        for name, array in zip(leaves.names, leaves.arrays, strict=True):
            if jnp.iscomplexobj(array):
                raise TypeError(f"{call}(…): expected real parameters, got {array.dtype} at {name!r}. Split it in two.")
        plan, made = planner.of(leaves)
        state = made.init(leaves.arrays)
        nu = state.second_moments[0] if by_bin else leaves.back(list(state.second_moments))
        last = LastStep.before(plan.num_bins, leaves.arrays)
        return GsoOptState(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.float32),
            leaves.back(list(state.first_moments)),
            nu,
            (state.of_gradient, state.of_update),
            last,
        )

    def update(updates: Any, state: GsoOptState, params: Any = None, **extra: Any) -> tuple[Any, GsoOptState]:
        if params is None:
            raise ValueError(
                f"{call}(…).update(updates, state): expected the parameters too, since limits and decay depend on "
                "them. Call update(updates, state, params)."
            )
        leaves, weights = leaves_of(updates, call=call), leaves_of(params, call=call).arrays
        _, made = planner.of(leaves)
        lr, top, pace = rate_now(learning_rate, state.num_steps, state.top)
        before = GsoState(
            state.num_steps.astype(state.last.norm_B.dtype),
            tuple(leaves_of(state.mu, call=call).arrays),
            (state.nu,) if by_bin else tuple(leaves_of(state.nu, call=call).arrays),
            *state.history,
        )
        changes, after, decision = made.update(leaves.arrays, before, weights, lr, pace)
        nu = after.second_moments[0] if by_bin else leaves.back(list(after.second_moments))
        return leaves.back(changes), GsoOptState(
            optax.safe_increment(state.num_steps),
            top,
            leaves.back(list(after.first_moments)),
            nu,
            (after.of_gradient, after.of_update),
            LastStep.of(decision),
        )

    return SplitTransformation.made(init, update, planner)
