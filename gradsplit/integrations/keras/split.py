"""`split`: any Keras optimizer as a splitting one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from ...budget import DEFAULT_IN_FRONT, DEFAULT_OF_SPLITTER, Fixed, RelativeStep
from ...functional import splitting
from ...plan import make_plan
from .layout import oriented_of
from .options import Options
from .report import Report
from .state import Kept, Rates

__all__ = ["Bounding", "refuse_replicas", "gradients_of_all", "values_of", "Splits", "split", "splitting_class"]

_UNBOUNDED = {"bin": Fixed(float("inf"))}
"""Where only the update is bounded: bins that are not finite are still set to zero."""


class Bounding:
    """What stands between the gradients of a splitting optimizer and its update.

    Keras counts every variable that it reaches through an optimizer's attributes as the optimizer's state. It does not
    look into a plain object such as this.

    Args:
        optimizer: built; owns the state.
        variables: what it trains.
        options: plan and budgets.
        cap_updates: budgets that bound the update act on the update itself, the others on the gradient.
        collective: divide the whole gradient where all bins are scaled together.

    Attributes:
        received: the variables that the gradients of this call are of.
    """

    def __init__(
        self, optimizer: Any, variables: list[Any], options: Options, *, cap_updates: bool, collective: bool
    ) -> None:
        call = options.call
        self._key = optimizer._var_key
        self._index = {self._key(variable): i for i, variable in enumerate(variables)}
        self._variables, self.received = variables, variables
        self._oriented = oriented_of(variables, options.orientation, call=call)
        self.plan = make_plan(options.plan, self._oriented.layout, call=call)
        pairs = options.budgets
        on_update = [pair for pair in pairs if pair[1].bounds_update and cap_updates]
        on_gradient = [pair for pair in pairs if pair not in on_update]
        self._gradient = self._splitting(on_gradient, options, collective=collective)
        self._update = self._splitting(on_update, options, collective=False) if on_update else None
        self._rates = Rates(optimizer) if any(budget.bounds_update for _, budget in pairs) else None
        like = [np.zeros((1,))]
        self._history = Kept(optimizer, "history", self._gradient.init(like))
        self._update_history = None if self._update is None else Kept(optimizer, "update", self._update.init(like))
        self.report = Report(optimizer, self.plan)

    def _splitting(self, pairs: list[Any], options: Options, *, collective: bool) -> Any:
        budget: dict[str, tuple[Any, ...]] = {}
        for level, one in pairs:
            budget[level] = (*budget.get(level, ()), one)
        return splitting(
            self.plan,
            budget or _UNBOUNDED,
            oriented=self._oriented,
            rule=options.rule,
            collective=collective,
            call=options.call,
        )

    def bounded(self, gradients: list[Any]) -> list[Any]:
        """Return the gradients of the received variables, each bin within its limits."""
        pace = reach = None
        if self._gradient.bounds_update and self._rates is not None:
            rate, pace = self._rates.now()
            reach = self._rates.reach(rate)
        weights = self._weights() if self._gradient.reads_weights else None
        everywhere = gradients_of_all(gradients, self.received, self._variables, self._key)
        bounded, history, decision = self._gradient.update(everywhere, self._history.read(), weights, pace, reach)
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


def values_of(variables: list[Any]) -> list[Any]:
    """Return the variables' values, apart from any gradient."""
    return [ops.stop_gradient(ops.convert_to_tensor(variable)) for variable in variables]


def gradients_of_all(
    gradients: list[Any], received: list[Any], variables: list[Any], key: Callable[[Any], Any]
) -> list[Any]:
    """Return one gradient per variable; zeros, which no limit touches, where the loss does not reach a variable."""
    given = {key(v): _dense(g) for g, v in zip(gradients, received, strict=True)}
    return [given[key(v)] if key(v) in given else ops.zeros_like(v) for v in variables]


def _dense(gradient: Any) -> Any:
    """Make a gradient dense: TensorFlow gives that of an embedding as slices, one per look-up of a row."""
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


def _follows_gradient(optimizer_class: type) -> bool:
    """Whether the update is the rate times a momentum sum of gradients: then bounding gradients bounds steps."""
    return issubclass(optimizer_class, keras.optimizers.SGD)


_KEPT = ("plan", "budget", "rule", "orientation", "cap_updates", "collective")


class Splits:
    """What a splitting optimizer has beside the optimizer that it is: see `split`.

    Gradients are bounded where Keras clips: once per update, after accumulation, unscaling and the filter of missing
    gradients, and before ``clipnorm`` and its kin, weight decay and the update itself.
    """

    def __init__(
        self,
        *args: Any,
        plan: Any = "xsp",
        budget: Any = None,
        rule: str = "bottom_up",
        orientation: Any = None,
        cap_updates: bool = False,
        collective: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        in_front = budget is None and not cap_updates and not _follows_gradient(type(self))
        if budget is None:
            usual = DEFAULT_IN_FRONT if in_front else DEFAULT_OF_SPLITTER
            budget = RelativeStep() if cap_updates else usual
        self._together = in_front if collective is None else bool(collective)
        options = Options.of("split(…)", plan=plan, budget=budget, rule=rule, orientation=orientation)
        bounds_steps = any(one.bounds_update for _, one in options.budgets)
        if bounds_steps and not cap_updates and not _follows_gradient(type(self)):
            raise ValueError(
                f"split({type(self).__mro__[2].__name__}(…)): RelativeStep bounds the step, but a limit on the "
                "gradient here says nothing about it. Leave budget= out for the default that fits, or use "
                "cap_updates=True (one copy of the weights), or gradsplit.integrations.keras.GSO instead."
            )
        self._options, self._cap_updates = options, bool(cap_updates)
        self._bounding: Bounding | None = None

    def build(self, variables: list[Any]) -> None:
        """Make the optimizer's variables, then those of the budgets."""
        if self.built:  # type: ignore[attr-defined]
            return
        super().build(variables)  # type: ignore[misc]
        # Keras overwrites some variables (scales of float8) by their "gradient", so there is nothing to bound in them.
        trained = [v for v in variables if not self._overwrite_variable_with_gradient(v)]  # type: ignore[attr-defined]
        self._bounding = Bounding(
            self, trained, self._options, cap_updates=self._cap_updates, collective=self._together
        )

    @property
    def split_report(self) -> Any:
        """What the last step did; None before the optimizer is built. See `SplitCallback`."""
        return None if self._bounding is None else self._bounding.report

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        assert self._bounding is not None
        refuse_replicas("split(…)")
        self._bounding.received = list(trainable_variables)
        super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        assert self._bounding is not None
        return super()._clip_gradients(self._bounding.bounded(list(grads)))  # type: ignore[misc]

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        bounding = self._bounding
        assert bounding is not None
        before = bounding.remember()
        super()._backend_update_step(grads, trainable_variables, learning_rate)  # type: ignore[misc]
        bounding.cap(before)

    def get_config(self) -> dict[str, Any]:
        """Return the optimizer's own configuration, and plan and budgets as plain values."""
        made = None if self._bounding is None else self._bounding.plan
        own = self._options.to_config(made)
        own |= {"cap_updates": self._cap_updates, "collective": self._together}
        return {**super().get_config(), **own}  # type: ignore[misc]


_CLASSES: dict[type, Any] = {}


def splitting_class(optimizer_class: Any) -> Any:
    """Return the splitting subclass of an optimizer class, registered as ``gradsplit>Split…``.

    For the optimizers of `keras.optimizers` it exists from import. For one of your own call it before
    `keras.saving.load_model` in a new process; `split` does the rest.

    >>> splitting_class(keras.optimizers.SGD).__name__
    'SplitSGD'
    """
    # On the torch backend Keras makes an instance of a faster subclass of the same name; that one is split.
    concrete = type(optimizer_class.__new__(optimizer_class))
    if concrete not in _CLASSES:
        name = f"Split{concrete.__name__}"
        made = type(name, (Splits, concrete), {"__module__": __name__, "__doc__": Splits.__doc__})
        _CLASSES[concrete] = keras.saving.register_keras_serializable("gradsplit")(made)
    return _CLASSES[concrete]


def split(
    optimizer: Any,
    plan: Any = "xsp",
    budget: Any = None,
    *,
    rule: str = "bottom_up",
    orientation: Any = None,
    cap_updates: bool = False,
    collective: bool | None = None,
) -> Any:
    """Return a splitting optimizer: each bin of the gradient is bounded by a budget of its own before the update.

    It works wherever Keras trains: eager, in ``tf.function``, with ``jit_compile=True``, under ``model.fit``, with
    ``gradient_accumulation_steps`` (bounded once, when the sum is complete), inside ``LossScaleOptimizer``, and it is
    saved and loaded with the model, history included. A bin that is not finite is set to zero and counted; no other
    bin feels it. On rows that mean output units see `gradsplit.integrations.keras.layout`.

    Args:
        optimizer: not built yet; a name such as "sgd" will do.
        plan: a Plan, a strategy's name or a function layout -> plan, as in `gradsplit.GradientSplitter`.
        budget: as there, the default too. In front of `keras.optimizers.SGD` it is ``RelativeStep(0.03, length=1.0)``,
            which reads the learning rate, schedules included, and the momentum. In front of all others it is
            ``Relative(1.0)`` with the collective rule; with ``cap_updates=True`` it is ``RelativeStep()``.
        rule: "bottom_up" or "nearest", see `gradsplit.project`.
        orientation: a mapping from patterns of names to the axis or axes that count output units, for example
            ``{"*.my_depthwise.kernel": (-2, -1)}``; None: by the layers' names.
        cap_updates: let `RelativeStep` cap the update itself, behind any optimizer, at the price of one copy of the
            weights during the update. Decoupled weight decay is not part of it.
        collective: divide the whole gradient where all bins are scaled together, see `gradsplit.collective`; None:
            where the default in front of an optimizer other than SGD is used.

    Raises:
        TypeError: no Keras optimizer.
        ValueError: an optimizer that is built, or that wraps another; an unknown name; RelativeStep in front of an
            optimizer whose step it cannot bound.

    >>> w = keras.Variable([[30.0, 0.3], [40.0, 0.4]])                  # (in, out): rows are columns here
    >>> optimizer = split(keras.optimizers.SGD(1.0), budget={"bin": "fixed"})
    >>> optimizer.apply([keras.ops.convert_to_tensor([[30.0, 0.3], [40.0, 0.4]])], [w])
    >>> keras.ops.convert_to_numpy(w).round(4)
    array([[29.4,  0. ],
           [39.2,  0. ]], dtype=float32)
    """
    if isinstance(optimizer, (str, dict)):
        optimizer = keras.optimizers.get(optimizer)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"split({optimizer!r}): expected an instance of a Keras optimizer, for example keras.optimizers.SGD(0.1)."
        )
    name = type(optimizer).__name__
    inside = [word for word in ("inner_optimizer", "optimizers") if hasattr(optimizer, word)]
    if inside:
        raise ValueError(
            f"split({name}(…)): expected an optimizer that updates by itself, got one around others, which sees "
            f"their gradients scaled or apart. Split what is inside: {name}(split(…))."
        )
    if isinstance(optimizer, Splits):
        raise ValueError(
            f"split({name}(…)): expected an optimizer that does not split yet. Give all budgets at once, "
            "for example budget=(Relative(0.2), Fixed(1.0))."
        )
    if optimizer.built:
        raise ValueError(
            f"split({name}(…)): expected an optimizer before its first step, got one with state. Make a new one, or "
            f"split it first and load its state afterwards."
        )
    made = splitting_class(type(optimizer))
    options = dict(zip(_KEPT, (plan, budget, rule, orientation, cap_updates, collective), strict=True))
    return made.from_config({**optimizer.get_config(), **options})


def _splits_alone(kind: Any) -> bool:
    """Whether it is an optimizer that updates by itself."""
    abstract, around = keras.optimizers.Optimizer, ("LossScaleOptimizer", "MultiOptimizer")
    return (
        isinstance(kind, type) and issubclass(kind, abstract) and kind is not abstract and kind.__name__ not in around
    )


for _kind in [kind for kind in vars(keras.optimizers).values() if _splits_alone(kind)]:
    splitting_class(_kind)
