"""Bounding the gradients of a built optimizer: which tensors, which plan, which state, and the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from ...budget import Fixed
from ...functional import splitting
from ...plan import make_plan
from .layout import oriented_of
from .options import Options
from .rates import Rates
from .report import Report
from .state import Kept

__all__ = ["Bounding", "refuse_replicas", "spread", "values_of"]

_UNBOUNDED = {"bin": Fixed(float("inf"))}
"""Where only the update is bounded: bins that are not finite are still set to zero."""


class Bounding:
    """The part of a splitting optimizer that stands between its gradients and its update.

    Keras tracks every variable that an optimizer's attributes reach, so that they would count as its state; here,
    inside a plain object, they do not.

    Args:
        optimizer: built; owns the state.
        variables: what it trains.
        options: plan and budgets.
        cap_updates: budgets that bound the update act on the update itself, the others on the gradient.

    Attributes:
        received: the variables that the gradients of this call are of.
    """

    def __init__(self, optimizer: Any, variables: list[Any], options: Options, *, cap_updates: bool) -> None:
        call = options.call
        self._key = optimizer._var_key
        self._index = {self._key(variable): i for i, variable in enumerate(variables)}
        self._variables, self.received = variables, variables
        self._oriented = oriented_of(variables, options.orientation, call=call)
        self.plan = make_plan(options.plan, self._oriented.layout, call=call)
        pairs = options.budgets
        on_update = [pair for pair in pairs if pair[1].bounds_update and cap_updates]
        on_gradient = [pair for pair in pairs if pair not in on_update]
        self._gradient = self._splitting(on_gradient, options)
        self._update = self._splitting(on_update, options) if on_update else None
        self._rates = Rates(optimizer) if any(budget.bounds_update for _, budget in pairs) else None
        like = [np.zeros((1,))]
        self._history = Kept(optimizer, "history", self._gradient.init(like))
        self._update_history = None if self._update is None else Kept(optimizer, "update", self._update.init(like))
        self.report = Report(optimizer, self.plan)

    def _splitting(self, pairs: list[Any], options: Options) -> Any:
        budget: dict[str, tuple[Any, ...]] = {}
        for level, one in pairs:
            budget[level] = (*budget.get(level, ()), one)
        return splitting(self.plan, budget or _UNBOUNDED, oriented=self._oriented, rule=options.rule, call=options.call)

    def bounded(self, gradients: list[Any]) -> list[Any]:
        """Return the gradients of the received variables, each bin within its limits."""
        pace = gain = None
        if self._gradient.bounds_update and self._rates is not None:
            rate, pace = self._rates.now()
            gain = self._rates.gain(rate)
        weights = self._weights() if self._gradient.reads_weights else None
        bounded, history, decision = self._gradient.update(
            self._spread(gradients), self._history.read(), weights, pace, gain
        )
        self._history.write(history)
        self.report.write(decision)
        return [bounded[self._index[self._key(variable)]] for variable in self.received]

    def remember(self) -> list[Any]:
        """Copy the weights before an update that will be bounded."""
        return [] if self._update is None else [ops.copy(weight) for weight in self._weights()]

    def cap(self, before: list[Any]) -> None:
        """Draw weights back to within the limits on the update; a bin whose update is not finite is undone."""
        if self._update is None or self._update_history is None or self._rates is None:
            return
        _, pace = self._rates.now()
        after = self._weights()
        moved = [new - old for new, old in zip(after, before, strict=True)]
        capped, history, _ = self._update.update(moved, self._update_history.read(), before, pace)
        self._update_history.write(history)
        for variable in self.received:
            i = self._index[self._key(variable)]
            # A bin within its limit keeps the optimizer's bits.
            variable.assign(ops.where(capped[i] == moved[i], after[i], before[i] + capped[i]))

    def _weights(self) -> list[Any]:
        return values_of(self._variables)

    def _spread(self, gradients: list[Any]) -> list[Any]:
        return spread(gradients, self.received, self._variables, self._key)


def values_of(variables: list[Any]) -> list[Any]:
    """Return the variables' values, apart from any gradient."""
    return [ops.stop_gradient(ops.convert_to_tensor(variable)) for variable in variables]


def spread(gradients: list[Any], received: list[Any], variables: list[Any], key: Callable[[Any], Any]) -> list[Any]:
    """Return one gradient a variable; zeros, which no limit touches, for those that the loss does not reach."""
    given = {key(v): _dense(g) for g, v in zip(gradients, received, strict=True)}
    return [given[key(v)] if key(v) in given else ops.zeros_like(v) for v in variables]


def _dense(gradient: Any) -> Any:
    """Make a gradient dense: TensorFlow gives those of embeddings as slices, a row as often as it was looked up."""
    if type(gradient).__name__ == "IndexedSlices":
        import tensorflow as tf

        return tf.convert_to_tensor(gradient)
    return ops.convert_to_tensor(gradient, sparse=False)


def refuse_replicas(call: str) -> None:
    """Refuse training on several replicas.

    Raises:
        ValueError: under a strategy that would add the replicas' gradients after they had been bounded.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        raise ValueError(
            f"{call}: expected one replica, got a strategy of {replicas}, which adds gradients after each replica has "
            "bounded its own. Train without tf.distribute, or on the JAX backend with keras.distribution."
        )
