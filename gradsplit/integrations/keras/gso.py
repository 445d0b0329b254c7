"""GSO as a Keras optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from ...functional import GsoOptions, GsoRule, ShareRule
from ...plan import Layout, Plan, make_plan, per_tensor
from .layout import known_kinds, oriented_of
from .options import Options
from .report import Report
from .split import gradients_of_all, refuse_replicas, values_of
from .state import Kept, Rates

__all__ = ["GSO"]


@keras.saving.register_keras_serializable("gradsplit")
class GSO(keras.optimizers.Optimizer):
    """Bound each row, choose a direction per variable, and move each row by a share of its own length.

    The formulas and limits are those of `gradsplit.GSO`; the numbers agree with it. The kind of a variable is told by
    its layer (Embedding, depthwise convolutions, biases) and by its shape. Gradients are bounded after accumulation and
    unscaling and after Keras' own ``clipnorm``.

    Args:
        learning_rate: the share of its length by which a row moves per step, in [0, 0.5]; a float, a schedule or a
            function. None: 0.03, and 0.01 for ``direction="adam"``. Best is a schedule that falls linearly to zero.
        plan, budget, rule: as in `gradsplit.GSO`.
        direction: "auto"; "orthogonal" or "adam" by patterns of names, ``{"*.gate.kernel": "adam"}``. The word "adam"
            alone makes AdamW over bins.
        kinds: "matrix", "embedding" or "vector" by patterns of names.
        blocks: numbers of equal blocks of rows that are made orthogonal one by one, for example the groups of a
            convolution, ``{"*.grouped.kernel": 4}``.
        beta_1, beta_2, epsilon: of the memories, under Keras' names; beta_2 None: 0.99, and 0.999 for
            ``direction="adam"``.
        weight_decay: decoupled, per step and unit of the learning rate. For ``direction="adam"`` it is not part of
            what is bounded, but shortened with it.
        second_moment: for ``direction="adam"``: "element", or "bin".
        orientation: see `split`.
        **kwargs: of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a constant out of its range, an unknown name; bins over several variables; when the optimizer is
            built, a pattern that matches no variable.
        TypeError: a function in place of a mapping, which a file could not hold.

    >>> w = keras.Variable([[3.0], [4.0]])
    >>> optimizer = GSO(0.1, weight_decay=0.0)
    >>> optimizer.apply([keras.ops.convert_to_tensor([[1e9], [0.0]])], [w])     # a tenth of the row's length, 5
    >>> keras.ops.convert_to_numpy(w).round(4)
    array([[2.5],
           [4. ]], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: Any = None,
        plan: Any = "xsp",
        budget: Any = None,
        *,
        direction: str | Mapping[str, str] = "auto",
        kinds: Mapping[str, str] | None = None,
        blocks: Mapping[str, int] | None = None,
        beta_1: float = 0.9,
        beta_2: float | None = None,
        epsilon: float = 1e-8,
        weight_decay: float = 1e-2,
        second_moment: str = "element",
        rule: str = "bottom_up",
        orientation: Any = None,
        name: str = "gso",
        **kwargs: Any,
    ) -> None:
        said = {"direction": direction, "kinds": kinds, "blocks": blocks}
        _check_mappings(said)
        asked = GsoOptions(
            "GSO",
            **{key: dict(one) if isinstance(one, Mapping) else one for key, one in said.items()},
            betas=(beta_1, beta_2),
            eps=epsilon,
            # Not self.weight_decay: that Keras would subtract before the step, from bins that are passed over too.
            weight_decay=weight_decay or 0.0,
            second_moment=second_moment,
            rule=rule,
        )
        super().__init__(learning_rate=asked.rate(learning_rate), name=name, **kwargs)
        self._asked, budget = asked, asked.budget(budget)
        self._options = Options.of("GSO(…)", plan=plan, budget=budget, rule=rule, orientation=orientation)
        self.epsilon, self.second_moment = epsilon, second_moment
        self._moving: _Moving | None = None
        one = Layout.from_shapes({"kernel": (1, 1)})  # a constant out of its range is refused now
        asked.rule_for(per_tensor(one), self._options.budget if asked.by_share else None)

    def build(self, variables: list[Any]) -> None:
        """Make moments, histories and counts for the variables."""
        if self.built:
            return
        super().build(variables)
        trained = [v for v in variables if not self._overwrite_variable_with_gradient(v)]
        oriented = oriented_of(trained, self._options.orientation, call="GSO(…)")
        plan = make_plan(self._options.plan, oriented.layout, call="GSO(…)")
        rule = self._asked.rule_for(plan, self._options.budget, oriented, known_kinds(oriented))
        self._moving = _Moving(self, trained, plan, rule)

    @property
    def split_report(self) -> Report | None:
        """What the last step did; None before the optimizer is built. See `SplitCallback`."""
        return None if self._moving is None else self._moving.report

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        refuse_replicas("GSO(…)")
        super()._backend_apply_gradients(grads, trainable_variables)

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        assert self._moving is not None
        self._moving.step(list(grads), list(trainable_variables))

    def load_own_variables(self, store: Any) -> None:
        """Load a saved state; in one of before, the number of layers in series is missing, and begins at 0."""
        at = None if self._moving is None else self._moving.place_of_series(self.variables)
        if at is not None and len(store.keys()) == len(self.variables) - 1:
            kept = {str(i + (i >= at)): store[str(i)] for i in range(len(self.variables) - 1)}
            store = {**kept, str(at): np.zeros(())}
        super().load_own_variables(store)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Refuse: decay is one number for all variables here.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "GSO.exclude_from_weight_decay(…): expected one weight_decay for all variables. Use weight_decay=0.0 and a "
            "kernel_regularizer on the layers that should decay."
        )

    def get_config(self) -> dict[str, Any]:
        """Return all arguments as plain values."""
        return {
            **super().get_config(),
            **self._options.to_config(None if self._moving is None else self._moving.plan),
            "direction": self._asked.direction,
            "kinds": self._asked.kinds,
            "blocks": self._asked.blocks,
            "beta_1": self._asked.betas[0],
            "beta_2": self._asked.betas[1],
            "epsilon": self._asked.eps,
            "weight_decay": self._asked.weight_decay,
            "second_moment": self._asked.second_moment,
        }


def _check_mappings(said: Mapping[str, Any]) -> None:
    for name, value in said.items():
        if not isinstance(value, (str if name == "direction" else type(None), Mapping)):
            raise TypeError(
                f"GSO({name}={value!r}): expected a mapping from patterns of names, which a .keras file can hold, for "
                f"example {{'*.kernel': …}}."
            )


class _Moving:
    """A built GSO: its rule and state; a plain object for the reason that `Bounding` is one."""

    def __init__(self, optimizer: Any, variables: list[Any], plan: Plan, rule: GsoRule | ShareRule) -> None:
        self.plan, self._variables, self._rule, self._key = plan, variables, rule, optimizer._var_key
        dtypes = [np.dtype(keras.backend.standardize_dtype(variable.dtype)) for variable in variables]
        weights = [np.zeros(v.shape, dtype=dtype) for v, dtype in zip(variables, dtypes, strict=True)]
        self._state = Kept(optimizer, "moments", rule.init(weights))
        self._rates = Rates(optimizer)
        self.report = Report(optimizer, plan)

    def place_of_series(self, variables: list[Any]) -> int | None:
        """Return the number of the variable that holds the number of layers in series."""
        if not isinstance(self._rule, ShareRule):
            return None
        return next(i for i, variable in enumerate(variables) if variable is self._state.variables[-1])

    def step(self, gradients: list[Any], received: list[Any]) -> None:
        """Move the variables that have a gradient."""
        rate, pace = self._rates.now()
        everywhere = gradients_of_all(gradients, received, self._variables, self._key)
        weights, reached = values_of(self._variables), {self._key(variable) for variable in received}
        if isinstance(self._rule, ShareRule):
            given = [g if self._key(v) in reached else None for g, v in zip(everywhere, self._variables, strict=True)]
            made: Any = self._rule.update(given, self._state.read(), weights, rate)
        else:
            made = self._rule.update(everywhere, self._state.read(), weights, rate, pace)
        changes, state, decision = made
        self._state.write(state)
        self.report.write(decision)
        for variable, change in zip(self._variables, changes, strict=True):
            if self._key(variable) in reached:
                variable.assign_add(change)
