"""`split`: any Keras optimizer as a splitting one."""

from __future__ import annotations

from typing import Any

import keras

from ...budget import DEFAULT_OF_SPLITTER, RelativeStep
from .bounding import Bounding, refuse_replicas
from .options import Options
from .rates import follows_gradient

__all__ = ["Splits", "split", "splitting_class"]

_KEPT = ("plan", "budget", "rule", "orientation", "cap_updates")


class Splits:
    """What a splitting optimizer has beside the optimizer that it is: see `split`.

    Gradients are bounded where Keras clips: once an update, after accumulation, unscaling and the filter of missing
    gradients, before ``clipnorm`` and its kin, weight decay and the update itself.
    """

    def __init__(
        self,
        *args: Any,
        plan: Any = "xsp",
        budget: Any = None,
        rule: str = "bottom_up",
        orientation: Any = None,
        cap_updates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if budget is None:
            budget = RelativeStep() if cap_updates else DEFAULT_OF_SPLITTER
        options = Options.of("split(…)", plan=plan, budget=budget, rule=rule, orientation=orientation)
        bounds_steps = any(one.bounds_update for _, one in options.budgets)
        if bounds_steps and not cap_updates and not follows_gradient(type(self)):
            raise ValueError(
                f"split({type(self).__mro__[2].__name__}(…)): RelativeStep bounds the step, but a limit on the "
                "gradient here says nothing about it. Use gradsplit.integrations.keras.GSO instead of the optimizer, "
                "or cap_updates=True (one copy of the weights), or another budget, for example Relative(0.2)."
            )
        self._options, self._cap_updates = options, bool(cap_updates)
        self._bounding: Bounding | None = None

    def build(self, variables: list[Any]) -> None:
        """Make the optimizer's variables, then those of the budgets."""
        if self.built:  # type: ignore[attr-defined]
            return
        super().build(variables)  # type: ignore[misc]
        # What Keras overwrites with its "gradient" (scales of float8) has none to bound.
        trained = [v for v in variables if not self._overwrite_variable_with_gradient(v)]  # type: ignore[attr-defined]
        self._bounding = Bounding(self, trained, self._options, cap_updates=self._cap_updates)

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
        return {**super().get_config(), **own, "cap_updates": self._cap_updates}  # type: ignore[misc]


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
) -> Any:
    """Return a splitting optimizer: each bin of the gradient is bounded by a budget of its own before the update.

    It works wherever Keras trains: eager, in ``tf.function``, with ``jit_compile=True``, under ``model.fit``, with
    ``gradient_accumulation_steps`` (bounded once, when the sum is complete), inside ``LossScaleOptimizer``, and it is
    saved and loaded with the model, history included. A bin that is not finite is set to zero and counted; no other
    bin feels it. On rows that mean output units see `gradsplit.integrations.keras.layout`.

    Args:
        optimizer: not built yet; a name such as "sgd" will do.
        plan: a Plan, a strategy's name or a function layout -> plan, as in `gradsplit.GradientSplitter`.
        budget: as there, the default too: `RelativeStep` reads the learning rate, schedules included, and the
            momentum, and needs `keras.optimizers.SGD`, ``cap_updates=True``, or `GSO`.
        rule: "bottom_up" or "nearest", see `gradsplit.project`.
        orientation: a mapping from patterns of names to the axis or axes that count output units, for example
            ``{"*.my_depthwise.kernel": (-2, -1)}``; None: by the layers' names.
        cap_updates: let `RelativeStep` cap the update itself, behind any optimizer, at the price of one copy of the
            weights during the update. Decoupled weight decay is not part of it.

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
    options = dict(zip(_KEPT, (plan, budget, rule, orientation, cap_updates), strict=True))
    return made.from_config({**optimizer.get_config(), **options})


def _splits_alone(kind: Any) -> bool:
    """Whether it is an optimizer that updates by itself."""
    abstract, around = keras.optimizers.Optimizer, ("LossScaleOptimizer", "MultiOptimizer")
    return (
        isinstance(kind, type) and issubclass(kind, abstract) and kind is not abstract and kind.__name__ not in around
    )


for _kind in [kind for kind in vars(keras.optimizers).values() if _splits_alone(kind)]:
    splitting_class(_kind)
