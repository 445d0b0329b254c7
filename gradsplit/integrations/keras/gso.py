"""GSO as a Keras optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from ...budget import DEFAULT_OF_GSO
from ...functional import DEFAULT_OF_SHARE, GsoRule, ShareRule, array_kinds, gso_rule, share_rule
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
        by_share = direction != "adam"
        _check_choices(direction, kinds, blocks, by_share=by_share)
        if learning_rate is None:
            learning_rate = 0.03 if by_share else 1e-2
        if by_share and isinstance(learning_rate, (int, float)) and not 0 <= learning_rate <= 0.5:
            raise ValueError(
                f"GSO({learning_rate}): expected a share of a row's length per step, in [0, 0.5]. The default is 0.03; "
                "use direction='adam' for a learning rate of AdamW."
            )
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if budget is None:
            budget = DEFAULT_OF_SHARE if by_share else DEFAULT_OF_GSO
        self._options = Options.of("GSO(…)", plan=plan, budget=budget, rule=rule, orientation=orientation)
        self._choices = _Choices(direction, kinds, blocks)
        self._betas = beta_1, ((0.99 if by_share else 0.999) if beta_2 is None else beta_2)
        self.epsilon, self.second_moment = epsilon, second_moment
        # Not self.weight_decay: that Keras would subtract before the step, from bins that are passed over too.
        self._decay = weight_decay or 0.0
        self._moving: _Moving | None = None
        one = Layout.from_shapes({"kernel": (1, 1)})
        self._rule_of(per_tensor(one), self._options.budget if by_share else DEFAULT_OF_GSO, None, None)

    def _rule_of(self, plan: Plan, budget: Any, oriented: Any, variables: Any) -> GsoRule | ShareRule:
        """Make the rule; a constant out of its range is refused here."""
        call, choices = "GSO(…)", self._choices
        constants: dict[str, Any] = {
            "betas": self._betas,
            "eps": self.epsilon,
            "weight_decay": self._decay,
            "oriented": oriented,
            "rule": self._options.rule,
            "call": call,
        }
        if choices.direction == "adam":
            return gso_rule(plan, budget, second_moment=self.second_moment, **constants)
        if self.second_moment != "element":
            raise ValueError(
                f"GSO(second_moment={self.second_moment!r}): expected 'element' beside a direction that has no second "
                "moment per bin. Use direction='adam' with it."
            )
        kinds = None
        if variables is not None:
            kinds = array_kinds(
                oriented,
                kinds=choices.kinds,
                direction=choices.direction,
                blocks=choices.blocks,
                known=known_kinds(oriented),
                call=call,
            )
        return share_rule(plan, budget, kinds=kinds, **constants)

    def build(self, variables: list[Any]) -> None:
        """Make moments, histories and counts for the variables."""
        if self.built:
            return
        super().build(variables)
        trained = [v for v in variables if not self._overwrite_variable_with_gradient(v)]
        oriented = oriented_of(trained, self._options.orientation, call="GSO(…)")
        plan = make_plan(self._options.plan, oriented.layout, call="GSO(…)")
        self._moving = _Moving(self, trained, plan, self._rule_of(plan, self._options.budget, oriented, trained))

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
            **self._choices.to_config(),
            "beta_1": self._betas[0],
            "beta_2": self._betas[1],
            "epsilon": self.epsilon,
            "weight_decay": self._decay,
            "second_moment": self.second_moment,
        }


class _Choices:
    """What the user says of single variables; a plain object for the reason that `Bounding` is one."""

    def __init__(self, direction: Any, kinds: Any, blocks: Any) -> None:
        self.direction = direction if isinstance(direction, str) else dict(direction)
        self.kinds, self.blocks = (None if one is None else dict(one) for one in (kinds, blocks))

    def to_config(self) -> dict[str, Any]:
        """Return plain values."""
        return {"direction": self.direction, "kinds": self.kinds, "blocks": self.blocks}


def _check_choices(direction: Any, kinds: Any, blocks: Any, *, by_share: bool) -> None:
    for name, value in (("direction", direction), ("kinds", kinds), ("blocks", blocks)):
        if not isinstance(value, (str if name == "direction" else type(None), Mapping)):
            raise TypeError(
                f"GSO({name}={value!r}): expected a mapping from patterns of names, which a .keras file can hold, for "
                f"example {{'*.kernel': …}}."
            )
    if not by_share and (kinds is not None or blocks is not None):
        raise ValueError(
            "GSO(direction='adam', …): expected neither kinds= nor blocks=, which belong to the share step. Leave them "
            "out, or use direction={'*': 'adam'}."
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
