"""The functional core in TensorFlow gives the scales of PyTorch's GradientSplitter, and GSO's weights."""

from __future__ import annotations

import numpy as np
import pytest

import gradsplit as gs
from gradsplit.functional import Orientation, Oriented, gso_rule, splitting
from tests.functional import in_torch
from tests.functional.cases import (
    CASES,
    LAST,
    LAYOUT,
    LR,
    MOMENTUM,
    NUM_STEPS,
    pace_at,
    turned,
    turned_back,
    weights,
)

OWN_SHAPES = {name: LAST.get(name, shape) for name, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True)}
ORIENTED = Oriented.of(OWN_SHAPES, Orientation())


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def tensorflow_scales(tf, name, *, jit=False, num_steps=NUM_STEPS, oriented=ORIENTED, momentum=MOMENTUM):
    """The scales in TensorFlow, float32, in one graph; (steps, B)."""
    case = CASES[name]
    split = splitting(case.plan(), case.budget, oriented=oriented, rule=case.rule, collective=case.collective)
    held, traces = [tf.constant(w) for w in turned(weights())], []

    @tf.function(jit_compile=jit, autograph=False)
    def step(given, history, pace, gain):
        traces.append(1)
        _, history, decision = split.update(given, history, held, pace, gain)
        return history, decision.scale_B

    history, made = split.init(held), []
    for i in range(num_steps):
        rate = tf.constant(pace_at(i) * LR / (1 - momentum), tf.float32)
        pace = tf.constant(pace_at(i), tf.float32)
        history, scale_B = step([tf.constant(g) for g in turned(case.gradients(i))], history, pace, rate)
        made.append(scale_B.numpy())
    assert len(traces) == 1, "traced once for the whole run"
    return np.stack(made)


def differences(scales, name):
    """How far scales are from PyTorch's, at most."""
    return float(np.abs(scales - in_torch.scales(name)[: len(scales)]).max())


@pytest.mark.parametrize("name", CASES)
def test_scales_in_tensorflow_are_those_of_torch(tf, name):
    assert differences(tensorflow_scales(tf, name), name) <= CASES[name].tolerance


# Compiling costs seconds a case; these hold every budget, level and pattern, and both ways to read them.
@pytest.mark.parametrize("name", ["tree_sp over rows / every budget / bottom_up", "lbf / ema", "xsp / relative_step"])
def test_scales_compiled_by_xla_are_those_of_torch(tf, name):
    assert differences(tensorflow_scales(tf, name, jit=True), name) <= CASES[name].tolerance


@pytest.mark.parametrize("second_moment", ["element", "bin"])
def test_a_run_of_gso_in_tensorflow_ends_at_torch_s_weights(tf, second_moment):
    rule = gso_rule(CASES["xsp / relative"].plan(), second_moment=second_moment, oriented=ORIENTED)

    @tf.function(autograph=False)
    def update(given, state, held, lr, pace):
        changes, state, _ = rule.update(given, state, held, lr, pace)
        return [w + change for w, change in zip(held, changes, strict=True)], state

    held = [tf.constant(w) for w in turned(weights())]
    state = rule.init(held)
    for i in range(in_torch.GSO_STEPS):
        given = [tf.constant(g) for g in turned(in_torch.gso_gradients(i, turned_back(held)))]
        lr, pace = (tf.constant(x * pace_at(i), tf.float32) for x in (in_torch.GSO_LR, 1.0))
        held, state = update(given, state, held, lr, pace)
    for ours, theirs in zip(turned_back(held), in_torch.after_gso(second_moment), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("jit", [False, True])
def test_entries_up_to_3e38_do_not_overflow(tf, jit):
    # A limit of 100: the scale of a limit of 1 would be below the least normal float32.
    split = splitting(CASES["xsp / fixed"].plan(), gs.Fixed(100.0), oriented=ORIENTED)
    given = [tf.constant(w) for w in turned(weights())]
    given[2] = tf.tensor_scatter_nd_update(tf.zeros((5, 6)), [[0, 1], [1, 1], [0, 2]], [3e38, 1e38, 3e20])

    @tf.function(jit_compile=jit, autograph=False)
    def step(given):
        bounded, _, decision = split.update(given, split.init(given))
        return bounded, decision.finite_B

    bounded, finite_B = step(given)
    assert finite_B.numpy().all()
    rows = np.linalg.norm(bounded[2].numpy(), axis=0)
    np.testing.assert_allclose(rows[1:3], [100.0, 100.0], rtol=1e-5)
    np.testing.assert_allclose(bounded[2].numpy()[:2, 1], np.array([300.0, 100.0]) / np.sqrt(10), rtol=1e-5)


def test_a_planted_fault_of_the_momentum_is_caught(tf):
    name = "xsp / relative_step"
    assert differences(tensorflow_scales(tf, name, num_steps=2, momentum=0.0), name) > 1e-3


def test_a_planted_fault_of_the_orientation_is_caught(tf):
    unturned = Oriented.of(OWN_SHAPES, Orientation((0,)))
    with pytest.raises(ValueError, match="expected a plan of these arrays"):
        tensorflow_scales(tf, "xsp / relative", num_steps=1, oriented=unturned)


def test_a_planted_fault_of_the_array_namespace_is_caught(tf, monkeypatch):
    from gradsplit.xp import tensorflow_xp

    length_over = tensorflow_xp.length_over
    monkeypatch.setattr(tensorflow_xp, "length_over", lambda x, axes: length_over(x, axes) * (1 + 1e-5))
    name = "xsp / fixed"
    assert differences(tensorflow_scales(tf, name, num_steps=2), name) > CASES[name].tolerance
