"""The pure functions in JAX and in float64 numpy give the scales of PyTorch's GradientSplitter, and GSO's weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import numpy as jnp

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


def jax_scales(name, num_steps=NUM_STEPS, oriented=ORIENTED, momentum=MOMENTUM):
    """The scales in JAX, float32, in one compiled function; (steps, B)."""
    case = CASES[name]
    split = splitting(case.plan(), case.budget, oriented=oriented, rule=case.rule, collective=case.collective)
    held, traces = [jnp.asarray(w) for w in turned(weights())], []

    @jax.jit
    def step(given, history, pace, reach):
        traces.append(1)
        _, history, decision = split.update(given, history, held, pace, reach)
        return history, decision.scale_B

    history, made = split.init(held), []
    for i in range(num_steps):
        rate = pace_at(i) * LR / (1 - momentum)
        history, scale_B = step([jnp.asarray(g) for g in turned(case.gradients(i))], history, pace_at(i), rate)
        made.append(np.asarray(scale_B))
    assert len(traces) == 1, "compiled once for the whole run"
    return np.stack(made)


@pytest.mark.parametrize("name", CASES)
def test_scales_in_jax_are_those_of_torch(name):
    np.testing.assert_allclose(jax_scales(name), in_torch.scales(name), rtol=0, atol=CASES[name].tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("xsp", "tree_sp over rows"))])
def test_scales_in_numpy_are_those_of_torch(name):
    case = CASES[name]
    split, held = splitting(case.plan(), case.budget, rule=case.rule, collective=case.collective), weights()
    history = split.init(held)
    for i in range(NUM_STEPS):
        rate = pace_at(i) * LR / (1 - MOMENTUM)
        _, history, decision = split.update(case.gradients(i), history, held, np.float64(pace_at(i)), np.float64(rate))
        np.testing.assert_allclose(decision.scale_B, in_torch.scales(name)[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("second_moment", ["element", "bin"])
def test_a_run_of_gso_in_jax_ends_at_torch_s_weights(second_moment):
    plan = CASES["xsp / relative"].plan()
    rule = gso_rule(plan, second_moment=second_moment, oriented=ORIENTED)
    update = jax.jit(lambda given, state, held, lr, pace: rule.update(given, state, held, lr, pace)[:2])
    held = [jnp.asarray(w) for w in turned(weights())]
    state = rule.init(held)
    for i in range(in_torch.GSO_STEPS):
        given = turned(in_torch.gso_gradients(i, turned_back(held)))
        changes, state = update(given, state, held, in_torch.GSO_LR * pace_at(i), pace_at(i))
        held = [w + change for w, change in zip(held, changes, strict=True)]
    for ours, theirs in zip(turned_back(held), in_torch.after_gso(second_moment), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
