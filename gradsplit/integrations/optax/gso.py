"""GSO for optax: rows that move by a share of their length, or with ``direction="adam"`` AdamW over bins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jax import Array
from jax import numpy as jnp

from ...functional import Choice, GsoOptions, GsoRule, GsoState, Oriented, ShareRule, ShareState
from ...plan import Layout, Plan
from .transformation import LastStep, Rate, SplitTransformation, rate_now
from .trees import Leaves, Planner, leaves_of

__all__ = ["GsoOptState", "GsoShareState", "gso"]


class GsoShareState(NamedTuple):
    """What the next step by shares depends on, and the last decision.

    Attributes:
        num_steps: steps made.
        seen: steps in which some gradient was finite and not zero.
        ages: steps of each array, one number per array.
        mu: mean gradients, a tree as the parameters.
        nu: mean squares, a tree as the parameters, without the arrays whose direction is not Adam's.
        recent: (B,) the largest norm that each bin has had of late.
        most: (B,) the longest that each bin may become.
        history: of the budgets.
        last: the last decision on the gradient, see `SplitTransformation.record`.
        series: the number of layers that stand in series of late.
    """

    num_steps: Array
    seen: Array
    ages: Array
    mu: Any
    nu: Any
    recent: Array
    most: Array
    history: Any
    last: LastStep
    series: Array | float = 0.0


class GsoOptState(NamedTuple):
    """What the next step of ``direction="adam"`` depends on, and the last decision.

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
    learning_rate: Rate | None = None,
    plan: Plan | str | Callable[[Layout], Plan] = "xsp",
    budget: Any = None,
    *,
    direction: Choice = "auto",
    kinds: Choice = None,
    blocks: Choice = None,
    b1: float = 0.9,
    b2: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    second_moment: str = "element",
    rule: str = "bottom_up",
    orientation: Any = "last",
) -> SplitTransformation:
    """Bound each row, choose a direction per array, and move each row by a share of its own length.

    The formulas are those of `gradsplit.GSO`, and so are the numbers. The kind of an array is told by its shape:
    matrices take the orthogonal direction, vectors take Adam's. Arrays named ``embedding`` or ``embeddings`` are
    embeddings, as flax names them. ``kinds`` and ``direction`` override both by path.

    Args:
        learning_rate: the share of its length by which a row moves per step, in [0, 0.5]; a float, an array or a
            schedule. None: 0.03, and 0.01 for ``direction="adam"``. Best is a schedule that falls linearly to zero.
        plan: see `split_gradients`; every bin lies inside one array.
        budget: of gradients, before the memory; None: ``Relative(0.2)``. For ``direction="adam"`` budgets that bound
            the update act on the update; None: ``(Relative(0.2), RelativeStep(0.03))``.
        direction: "auto"; "orthogonal" or "adam" by patterns of paths, ``{"*.gate.kernel": "adam"}``; or a function
            (path, shape) -> direction or None. The word "adam" alone makes AdamW over bins.
        kinds: "matrix", "embedding" or "vector" by patterns of paths, or by such a function.
        blocks: numbers of equal blocks of rows that are made orthogonal one by one, ``{"*.qkv.kernel": 3}``.
        b1: decay of the mean gradient, in [0, 1).
        b2: decay of the mean square, in [0, 1); None: 0.99, and 0.999 for ``direction="adam"``.
        eps: added to Adam's denominator, >= 0.
        weight_decay: decoupled, per step and unit of the learning rate, >= 0. For ``direction="adam"`` it is not part
            of what is bounded, but shortened with it.
        second_moment: for ``direction="adam"``: "element", or "bin": one per bin, which saves a copy of the weights.
        rule: "bottom_up" or "nearest".
        orientation: see `split_gradients`.

    Raises:
        ValueError: a constant out of its range, an unknown name, bins over several arrays; from ``init``, a pattern
            that matches no path; from ``update``, no ``params``.
        TypeError: complex parameters.

    >>> optimizer = gso(0.1, weight_decay=0.0)
    >>> params = {"kernel": jnp.asarray([[3.0], [4.0]])}                      # one row of length 5
    >>> updates, _ = optimizer.update({"kernel": jnp.asarray([[1e9], [0.0]])}, optimizer.init(params), params)
    >>> print((params["kernel"] + updates["kernel"]).ravel().round(4))        # a tenth of it
    [2.5 4. ]
    """
    options = GsoOptions(
        "gso",
        direction=direction,
        kinds=kinds,
        blocks=blocks,
        betas=(b1, b2),
        eps=eps,
        weight_decay=weight_decay,
        second_moment=second_moment,
        rule=rule,
    )

    def make(made: Plan, oriented: Oriented) -> GsoRule | ShareRule:
        return options.rule_for(made, budget, oriented, _tokens(oriented))

    planner, rate = Planner(plan, orientation, make, call="gso"), options.rate(learning_rate)
    return _by_share(planner, rate) if options.by_share else _by_adam(planner, rate, by_bin=second_moment == "bin")


def _tokens(oriented: Oriented) -> dict[str, tuple[str | None, int]]:
    """The arrays that are embeddings by the names that flax gives them, see `array_kinds`."""
    return {
        name: ("embedding", 1)
        for name, shape in zip(oriented.layout.names, oriented.shapes, strict=True)
        if len(shape) > 1 and name.rpartition(".")[2] in ("embedding", "embeddings")
    }


def _real_leaves(params: Any) -> Leaves:
    leaves = leaves_of(params, call="gso")
    for name, array in zip(leaves.names, leaves.arrays, strict=True):
        if jnp.iscomplexobj(array):
            raise TypeError(f"gso(…): expected real parameters, got {array.dtype} at {name!r}. Split it in two.")
    return leaves


def _both(planner: Planner, updates: Any, params: Any) -> tuple[Leaves, list[Any]]:
    """Return gradients and weights."""
    if params is None:
        raise ValueError(
            "gso(…).update(updates, state): expected the parameters too, since limits and decay depend on them. Call "
            "update(updates, state, params)."
        )
    leaves = leaves_of(updates, call="gso")
    return leaves, planner.weights(params, leaves)


def _arrays_of(tree: Any) -> tuple[Any, ...]:
    return tuple(leaves_of(tree, call="gso").arrays)


def _by_share(planner: Planner, learning_rate: Rate) -> SplitTransformation:
    def squares_tree(leaves: Leaves, made: ShareRule, squares: tuple[Any, ...]) -> Any:
        """Return one mean square per array that has one, and optax's mask node for all others."""
        left = iter(squares)
        holes = [next(left) if kind.direction == "adam" else optax.MaskedNode() for kind in made.kinds]
        return leaves.back(holes)

    def init(params: Any) -> GsoShareState:
        leaves = _real_leaves(params)
        plan, made = planner.of(leaves)
        first = made.init(leaves.arrays)
        return GsoShareState(
            jnp.zeros((), jnp.int32),
            first.steps,
            first.ages_T,
            leaves.back(list(first.momenta)),
            squares_tree(leaves, made, first.squares),
            first.recent_B,
            first.most_B,
            first.of_gradient,
            LastStep.before(plan.num_bins, leaves.arrays),
            first.series,
        )

    def update(updates: Any, state: GsoShareState, params: Any = None, **extra: Any) -> tuple[Any, GsoShareState]:
        leaves, weights = _both(planner, updates, params)
        _, made = planner.of(leaves)
        share = learning_rate(state.num_steps) if callable(learning_rate) else learning_rate
        memories = _arrays_of(state.mu), _arrays_of(state.nu)
        before = ShareState(state.seen, state.ages, *memories, state.recent, state.most, state.history, state.series)
        changes, after, decision = made.update(leaves.arrays, before, weights, jnp.asarray(share))
        return leaves.back(changes), GsoShareState(
            optax.safe_increment(state.num_steps),
            after.steps,
            after.ages_T,
            leaves.back(list(after.momenta)),
            squares_tree(leaves, made, after.squares),
            after.recent_B,
            after.most_B,
            after.of_gradient,
            LastStep.of(decision),
            after.series,
        )

    return SplitTransformation.made(init, update, planner)


def _by_adam(planner: Planner, learning_rate: Rate, *, by_bin: bool) -> SplitTransformation:
    def init(params: Any) -> GsoOptState:
        leaves = _real_leaves(params)
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
        leaves, weights = _both(planner, updates, params)
        _, made = planner.of(leaves)
        lr, top, pace = rate_now(learning_rate, state.num_steps, state.top)
        before = GsoState(
            state.num_steps.astype(state.last.norm_B.dtype),
            _arrays_of(state.mu),
            (state.nu,) if by_bin else _arrays_of(state.nu),
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
