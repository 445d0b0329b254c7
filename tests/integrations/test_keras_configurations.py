"""What a user asks of the Keras adapter: kept as plain values in a file, or refused with the remedy."""

from __future__ import annotations

import json

import pytest

import gradsplit as gs
from tests.functional.cases import LAYOUT
from tests.laws.cases import BUDGETS

keras = pytest.importorskip("keras")

from gradsplit.integrations import keras as gsk  # noqa: E402 - needs the line above
from gradsplit.integrations.keras import options  # noqa: E402
from tests.integrations.keras_cases import UNITS, one_step, variables  # noqa: E402

BUDGETS_OF_ALL_KINDS = {
    **BUDGETS,
    "name": "fixed",
    "tuple": (gs.Relative(0.2), gs.Fixed(1.0)),
    "levels": {"root": gs.Fixed(1.0), "bin": ("ema", gs.ZScore(2.0))},
    "one limit a bin": gs.Fixed((1.0, 2.0, 3.0)),
}


@pytest.mark.parametrize("budget", BUDGETS_OF_ALL_KINDS.values(), ids=BUDGETS_OF_ALL_KINDS)
def test_a_configuration_is_plain_and_makes_the_same_optimizer(budget):
    made = gsk.split(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), "per_tensor", budget, rule="nearest")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(made)))
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(made)
    assert again.get_config() == made.get_config()
    assert again._options.budgets == made._options.budgets
    assert (again.momentum, again.nesterov) == (0.9, True)


def test_a_plan_and_a_function_are_saved_as_the_plan_they_made():
    held = variables()
    made = gsk.split(keras.optimizers.SGD(0.1), lambda layout: gs.xsp(layout, parts=2), gs.Fixed(1.0))
    with pytest.raises(ValueError, match=r"a function that has made none yet.*Build the optimizer first"):
        made.get_config()
    made.build(held)
    again = type(made).from_config(json.loads(json.dumps(made.get_config())))
    again.build(held)
    assert again._bounding.plan.fingerprint == gs.xsp(LAYOUT, parts=2).fingerprint


OF_GSO = {
    "by share": {"direction": {"*.kernel": "adam"}, "kinds": {"head.*": "matrix"}, "blocks": {"qkv.kernel": 3}},
    "adam": {"direction": "adam", "second_moment": "bin"},
}


@pytest.mark.parametrize("options", OF_GSO.values(), ids=OF_GSO)
def test_gso_s_configuration_makes_the_same_optimizer(options):
    options = {**options, "beta_1": 0.8, "beta_2": 0.98, "epsilon": 1e-6, "weight_decay": 0.1}
    made = gsk.GSO(0.01, **options)
    again = gsk.GSO.from_config(json.loads(json.dumps(made.get_config())))
    assert again.get_config() == made.get_config()
    assert again._options.budgets == made._options.budgets


def test_every_optimizer_of_keras_can_be_split():
    kinds = {
        name
        for name, kind in vars(keras.optimizers).items()
        if isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer)
    } - {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
    assert len(kinds) > 10
    for name in sorted(kinds):
        made = gsk.split(getattr(keras.optimizers, name)(), budget=gs.Fixed(1.0))
        one_step(made, UNITS)
        assert made.split_report.counts()[0].tolist() == [1.0, 0.0, 1.0], name


class Own(gs.Budget):
    name = "own"

    def limits(self, xp, reading, state):
        return reading.norm


def built():
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(variables())
    return optimizer


ERRORS = {
    "no optimizer": (lambda: gsk.split(0.1), TypeError, r"split\(0\.1\): expected an instance of a Keras optimizer"),
    "already built": (lambda: gsk.split(built()), ValueError, r"expected an optimizer before its first step"),
    "split twice": (lambda: gsk.split(gsk.split("sgd")), ValueError, r"does not split yet\. Give all budgets at once"),
    "around another": (
        lambda: gsk.split(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))),
        ValueError,
        r"Split what is inside: LossScaleOptimizer\(split\(…\)\)",
    ),
    "bound on the step before Adam": (
        lambda: gsk.split("adam", budget="relative_step"),
        ValueError,
        r"split\(Adam\(…\)\): RelativeStep bounds the step.*Leave budget= out.*cap_updates=True.*GSO instead",
    ),
    "unknown plan": (lambda: gsk.split("sgd", "xps"), ValueError, r"Did you mean 'xsp'\?"),
    "unknown budget": (lambda: gsk.split("sgd", budget="emma"), ValueError, r"Did you mean 'ema'\?"),
    "unknown rule": (lambda: gsk.split("sgd", rule="x"), ValueError, r"rule='x'\): expected one of bottom_up, nearest"),
    "unknown orientation": (lambda: gsk.split("sgd", orientation=3), TypeError, r"orientation=3\): expected"),
    "needs energies": (lambda: gsk.split("sgd", "lbf"), ValueError, r"does not need energies.*keras\.energies"),
    "no plan": (lambda: gsk.split("sgd", 3), TypeError, r"expected a Plan, a strategy's name or a function, got int"),
    "no variables": (lambda: gsk.layout_of([]), ValueError, r"expected trainable variables, got none"),
    "own budget saved": (
        lambda: gsk.split("sgd", budget=Own()).get_config(),
        ValueError,
        r"expected registered budgets, got Own",
    ),
    "a constant of GSO": (lambda: gsk.GSO(beta_1=1.0), ValueError, r"GSO\(betas=\(1\.0, 0\.99\)\)"),
    "a second moment": (
        lambda: gsk.GSO(direction="adam", second_moment="row"),
        ValueError,
        r"expected 'element' or 'bin'",
    ),
    "a share": (lambda: gsk.GSO(1.0), ValueError, r"GSO\(1\.0\): expected a share of a row's length per step"),
    "a function": (lambda: gsk.GSO(direction=lambda name, shape: None), TypeError, r"expected a mapping from patterns"),
    "kinds without shares": (lambda: gsk.GSO(direction="adam", kinds={}), ValueError, r"neither kinds= nor blocks="),
    "a bin of the share step": (lambda: gsk.GSO(second_moment="bin"), ValueError, r"Use direction='adam' with it"),
    "a budget of updates": (lambda: gsk.GSO(budget="relative_step"), ValueError, r"expected budgets of gradients"),
    "exclusion": (
        lambda: gsk.GSO().exclude_from_weight_decay(var_names=["bias"]),
        ValueError,
        r"expected one weight_decay for all variables.*kernel_regularizer",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_the_call_the_rule_and_the_remedy(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_options_look_at_every_level():
    made = options.Options.of("f", plan="xsp", budget={"module": "fixed"}, rule="bottom_up", orientation=None)
    assert made.budgets == [("module", gs.Fixed())]
