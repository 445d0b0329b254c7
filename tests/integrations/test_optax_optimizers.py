"""In front of and behind the optimizers of optax: the default that fits, and a cap on every row."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import gradsplit as gs
from gradsplit.integrations.optax import cap_updates, split_gradients
from tests.functional.cases import weights
from tests.integrations.test_optax import arrays_of, tree

OPTIMIZERS = {
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01),
    "muon": lambda: optax.contrib.muon(0.01),
    "lion": lambda: optax.lion(0.001),
    "adafactor": lambda: optax.adafactor(0.01),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(0.01),
    "prodigy": lambda: optax.contrib.prodigy(),
}
"""optax's own, that rescale gradients by themselves."""


def runs(optimizer, num_steps=40):
    """The distance to a target after some steps: clean, with a NaN and with a batch times 1,000 in every tenth step.

    It is one compilation for all three.
    """
    start, target = tree(weights()), tree(weights(7))

    @jax.jit
    def step(params, state, entry, times):
        given = jax.tree.map(lambda a, b: times * (a - b), params, target)
        given["scale"] = given["scale"] + entry
        updates, state = optimizer.update(given, state, params)
        return optax.apply_updates(params, updates), state

    ends = []
    for entry, times in ((0.0, 1.0), (np.nan, 1.0), (0.0, 1e3)):
        params, state = start, optimizer.init(start)
        for i in range(num_steps):
            faulty = i % 10 == 5
            params, state = step(params, state, entry if faulty else 0.0, times if faulty else 1.0)
        ends.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, params, target))))
    return ends


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_in_front_keeps_faults_out_of_any_optimizer(name):
    plain, with_nan, _ = runs(OPTIMIZERS[name]())
    assert not np.isfinite(with_nan), "the fault would not have mattered"
    clean, *faulty = runs(optax.chain(split_gradients(), OPTIMIZERS[name]()))
    assert max(clean, *faulty) < 1.05 * plain, f"{clean} without faults, {faulty} with, {plain} without a splitter"


def test_the_default_follows_the_optimizer():
    """In front of an SGD, whose rate is known, the step is bounded; in front of others faults are kept out."""
    given = tree([1e3 * w for w in weights(4)])
    params = tree(weights())
    bounded, _ = split_gradients().update(given, split_gradients().init(params), params)
    expected, _ = (s := split_gradients("xsp", gs.Relative(1.0))).update(given, s.init(params), params)
    for x, y in zip(jax.tree.leaves(bounded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    sgd = split_gradients(learning_rate=0.1)
    bounded, _ = sgd.update(given, sgd.init(params), params)
    step = gs.RelativeStep(0.03, length=1.0)
    expected, _ = (s := split_gradients("xsp", step, learning_rate=0.1)).update(given, s.init(params), params)
    for x, y in zip(jax.tree.leaves(bounded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_batch_that_is_scaled_as_a_whole_is_divided_by_its_own_factor():
    """Closed form: after norms that stay, a batch times 1,000 becomes the usual gradient again."""
    given = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((5, 40)), jnp.float32)}
    split = split_gradients("xsp", gs.Fixed(float("inf")), collective=True)
    state = split.init(given)
    for _ in range(10):
        bounded, state = split.update(given, state)
        np.testing.assert_array_equal(bounded["kernel"], given["kernel"])
    bounded, state = jax.jit(split.update)({"kernel": 1e3 * given["kernel"]}, state)
    np.testing.assert_allclose(bounded["kernel"], given["kernel"], rtol=1e-5)
    # One row alone is nobody else's business.
    bounded, state = split.update({"kernel": given["kernel"].at[:, 3].mul(1e3)}, state)
    np.testing.assert_array_equal(bounded["kernel"][:, 4], given["kernel"][:, 4])


@pytest.mark.parametrize("kind", ["muon", "adam"])
def test_a_cap_behind_muon_bounds_every_row(kind):
    params, given = tree(weights()), tree(weights(4))
    optimizer = optax.chain(split_gradients(), OPTIMIZERS[kind](), optax.scale(100.0), cap_updates())
    updates, _ = jax.jit(optimizer.update)(given, optimizer.init(params), params)
    for u, w in zip(arrays_of(updates), arrays_of(params), strict=True):
        u, w = (a.reshape(len(a), -1) if a.ndim > 1 else a.reshape(1, -1) for a in (u, w))
        limit = 0.03 * np.maximum(np.linalg.norm(w, axis=1), 0.01 * w.shape[1] ** 0.5)
        np.testing.assert_allclose(np.linalg.norm(u, axis=1), limit, rtol=1e-4)


@pytest.mark.parametrize(
    "made, plain",
    [
        (
            lambda: optax.inject_hyperparams(split_gradients)(learning_rate=0.1, momentum=0.5),
            lambda: split_gradients(learning_rate=0.1, momentum=0.5),
        ),
        (lambda: optax.inject_hyperparams(split_gradients)("xsp", "fixed"), lambda: split_gradients("xsp", "fixed")),
        (lambda: optax.inject_hyperparams(cap_updates)(learning_rate=0.1), lambda: cap_updates(learning_rate=0.1)),
        (lambda: optax.inject_hyperparams(split_gradients)(), lambda: split_gradients()),
        (
            lambda: optax.inject_hyperparams(split_gradients)(collective=True, budget=gs.Relative(1.0)),
            lambda: split_gradients(),
        ),
        (
            lambda: optax.inject_hyperparams(lambda lr: optax.chain(split_gradients(), optax.contrib.muon(lr)))(lr=0.1),
            lambda: optax.chain(split_gradients(), optax.contrib.muon(0.1)),
        ),
    ],
    ids=["split, rate and momentum", "split", "cap", "default", "collective", "default, muon"],
)
def test_hyperparameters_may_be_injected_under_jit(made, plain):
    params, given = tree(weights()), tree(weights(4))
    injected, own = made(), plain()
    bounded, _ = jax.jit(injected.update)(given, injected.init(params), params)
    expected, _ = jax.jit(own.update)(given, own.init(params), params)
    for x, y in zip(jax.tree.leaves(bounded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-5)


@pytest.mark.parametrize(
    "budget, value", [(gs.Fixed, 0.5), (gs.Relative, 0.5), (gs.Ema, 1.5), (gs.Percentile, 0.5), (gs.ZScore, 2.0)]
)
def test_a_traced_constant_of_a_budget_is_refused_by_name(budget, value):
    params, given = tree(weights()), tree(weights(4))
    optimizer = optax.inject_hyperparams(lambda constant: split_gradients("xsp", budget(constant)))(constant=value)

    with pytest.raises(
        TypeError, match=rf"{budget.__name__}\(.*=…\): expected a number, got one that is traced by jit"
    ):
        optimizer.init(params) and jax.jit(optimizer.update)(given, optimizer.init(params), params)
