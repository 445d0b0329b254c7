"""GSO as a Keras optimizer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from ...budget import DEFAULT_OF_GSO
from ...functional import GsoRule, gso_rule
from ...plan import Layout, Plan, make_plan, per_tensor
from .layout import oriented_of
from .options import Options
from .report import Report
from .split import gradients_of_all, refuse_replicas, values_of
from .state import Kept, Rates

__all__ = ["GSO"]


@keras.saving.register_keras_serializable("gradsplit")
class GSO(keras.optimizers.Optimizer):
    """AdamW over bins: no bin's gradient may poison the moments, no bin may move by more than a share of its length.

    The formulas, defaults and limits are those of `gradsplit.GSO`; the numbers agree with it. Gradients are bounded
    after accumulation and unscaling and after Keras' own ``clipnorm``.

    Args:
        learning_rate: a float, a schedule or a function.
        plan, budget, rule, second_moment: as in `gradsplit.GSO`.
        beta_1, beta_2, epsilon: of the moments, under Keras' names.
        weight_decay: decoupled, per step and unit of the learning rate; not part of what is bounded, but
            shortened with it.
        orientation: see `split`.
        **kwargs: of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a constant out of its range, an unknown name; "bin" with bins over several variables.

    >>> w = keras.Variable([[3.0], [4.0]])
    >>> optimizer = GSO(1.0, weight_decay=0.0)
    >>> optimizer.apply([keras.ops.convert_to_tensor([[1e9], [0.0]])], [w])     # at most 3 % of the row's length, 5
    >>> keras.ops.convert_to_numpy(w).round(4)
    array([[2.85],
           [4.  ]], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        plan: Any = "xsp",
        budget: Any = DEFAULT_OF_GSO,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 1e-2,
        second_moment: str = "element",
        rule: str = "bottom_up",
        orientation: Any = None,
        name: str = "gso",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self._options = Options.of("GSO(…)", plan=plan, budget=budget, rule=rule, orientation=orientation)
        self._betas, self.epsilon, self.second_moment = (beta_1, beta_2), epsilon, second_moment
        # Not self.weight_decay: that Keras would subtract before the step, from bins that are passed over too.
        self._decay = weight_decay or 0.0
        self._moving: _Moving | None = None
        one = Layout.from_shapes({"kernel": (1, 1)})
        self._rule_of(per_tensor(one), DEFAULT_OF_GSO, None)  # a constant out of its range is refused now

    def _rule_of(self, plan: Plan, budget: Any, oriented: Any) -> GsoRule:
        return gso_rule(
            plan,
            budget,
            betas=self._betas,
            eps=self.epsilon,
            weight_decay=self._decay,
            second_moment=self.second_moment,
            oriented=oriented,
            rule=self._options.rule,
            call="GSO(…)",
        )

    def build(self, variables: list[Any]) -> None:
        """Make moments, histories and counts for the variables."""
        if self.built:
            return
        super().build(variables)
        trained = [v for v in variables if not self._overwrite_variable_with_gradient(v)]
        oriented = oriented_of(trained, self._options.orientation, call="GSO(…)")
        plan = make_plan(self._options.plan, oriented.layout, call="GSO(…)")
        self._moving = _Moving(self, trained, plan, self._rule_of(plan, self._options.budget, oriented))

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
            "beta_1": self._betas[0],
            "beta_2": self._betas[1],
            "epsilon": self.epsilon,
            "weight_decay": self._decay,
            "second_moment": self.second_moment,
        }


class _Moving:
    """A built GSO: its rule and state; a plain object for the reason that `Bounding` is one."""

    def __init__(self, optimizer: Any, variables: list[Any], plan: Plan, rule: GsoRule) -> None:
        self.plan, self._variables, self._rule, self._key = plan, variables, rule, optimizer._var_key
        dtypes = [np.dtype(keras.backend.standardize_dtype(variable.dtype)) for variable in variables]
        weights = [np.zeros(v.shape, dtype=dtype) for v, dtype in zip(variables, dtypes, strict=True)]
        self._state = Kept(optimizer, "moments", rule.init(weights))
        self._rates = Rates(optimizer)
        self.report = Report(optimizer, plan)

    def step(self, gradients: list[Any], received: list[Any]) -> None:
        """Move the variables that have a gradient."""
        rate, pace = self._rates.now()
        everywhere = gradients_of_all(gradients, received, self._variables, self._key)
        weights = values_of(self._variables)
        changes, state, decision = self._rule.update(everywhere, self._state.read(), weights, rate, pace)
        self._state.write(state)
        self.report.write(decision)
        reached = {self._key(variable) for variable in received}
        for variable, change in zip(self._variables, changes, strict=True):
            if self._key(variable) in reached:
                variable.assign_add(change)
