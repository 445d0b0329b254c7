"""The transformation that users hold: optax's pair of functions, and a way to read the last decision on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from jax import Array
from jax import numpy as jnp

from ...budget import Decision
from ...plan import Plan
from ...split import StepRecord
from ...xp import namespace
from .trees import Planner, leaves_of

__all__ = ["LastStep", "Rate", "SplitTransformation", "rate_now"]

Rate = Any
"""A learning rate: a float, a 0-d array, or a schedule, a function of the step."""


class LastStep(NamedTuple):
    """The decision of the last step, in the optimizer's state, one entry per bin.

    Attributes:
        norm_B: L2 norms, 0 where not finite.
        finite_B: whether all of the bin's entries were finite.
        scale_B: factors in [0, 1].
        limit_B: the bins' own limits.
    """

    norm_B: Array
    finite_B: Array
    scale_B: Array
    limit_B: Array

    @classmethod
    def before(cls, num_bins: int, arrays: list[Array]) -> LastStep:
        """What stands there before the first step: nothing was bounded."""
        like = namespace(arrays[0]).accumulator(arrays)
        ones, unbounded = jnp.ones(num_bins, like.dtype), jnp.full(num_bins, jnp.inf, like.dtype)
        return cls(ones * 0, jnp.ones(num_bins, bool), ones, unbounded)

    @classmethod
    def of(cls, decision: Decision) -> LastStep:
        """The arrays of a decision."""
        return cls(decision.norm_B, decision.finite_B, decision.scale_B, decision.limit_B)


def rate_now(learning_rate: Rate, num_steps: Array, top: Array) -> tuple[Array, Array, Array]:
    """Return the learning rate at a step, the largest so far, and their quotient; a rate of 0 counts as 1e-30."""
    lr = jnp.asarray(learning_rate(num_steps) if callable(learning_rate) else learning_rate, top.dtype)
    positive = jnp.maximum(lr, 1e-30)
    top = jnp.maximum(top, positive)
    return lr, top, positive / top


class SplitTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc, unused-ignore]
    """A gradient transformation of optax that also knows its plan.

    Inside `optax.chain` it is a link like any other. Keep the transformation itself, so that you can ask what it did.
    """

    _planner: Planner

    @classmethod
    def made(cls, init: Any, update: Any, planner: Planner) -> SplitTransformation:
        """Make one from optax's two functions."""
        self = cls(init, update)
        self._planner = planner
        return self

    def plan_of(self, params: Any) -> Plan:
        """Return the plan of a parameter tree; only names and shapes are looked at."""
        plan, _ = self._planner.of(leaves_of(params, call="plan_of"))
        return plan

    def record(self, state: Any, params: Any) -> StepRecord:
        """Return what the last step did, on the host: ``.worst(5)`` names the bins that were touched hardest.

        This copies four vectors with one number per bin, and waits for them.

        Args:
            state: the state of this transformation, or of a chain that contains it.
            params: the parameters, for names and shapes; all of them where a part of them was stepped.

        Raises:
            ValueError: a state without this transformation's, or with several that could be.
        """
        plan = self.plan_of(params)
        held = [one for one in jax.tree_util.tree_leaves(state, is_leaf=_remembers) if _remembers(one)]
        # Behind optax.masked or multi_transform the tree that was stepped is a part of the parameters.
        for plans in ([plan], self._planner.plans):
            pairs = [(s, one) for s in held for one in plans if s.last.scale_B.shape == (one.num_bins,)]
            if pairs:
                break
        if len(pairs) != 1:
            raise ValueError(
                f"record(state, params): expected the state of one transformation over {plan.num_bins} bins, got "
                f"{len(pairs)}. Pass this transformation's state out of the chain's; where the state was mapped over "
                "seeds, pass that of one seed."
            )
        ((stepped, plan),) = pairs
        norm, finite, scale, limit = (torch.from_numpy(np.array(array)) for array in stepped.last)
        squares = torch.where(finite, norm.double() ** 2, torch.full_like(norm, float("nan"), dtype=torch.float64))
        decision = Decision(plan, norm.double(), finite, scale.double(), (("bin", None, limit.double()),))
        return StepRecord(max(int(stepped.num_steps) - 1, 0), squares, decision)


def _remembers(state: Any) -> bool:
    return isinstance(getattr(state, "last", None), LastStep)
