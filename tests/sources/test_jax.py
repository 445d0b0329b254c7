"""The same rules in JAX give the numbers of the formula, and of the PyTorch classes."""

from __future__ import annotations

import dataclasses
import inspect
import math

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp
from torch import nn

from gradsplit.integrations.optax import split_samples, split_terms
from gradsplit.sources import RULES, TermSplitter
from tests.sources.oracle import limits
from tests.sources.test_terms import values_of_terms


def _histories():
    generator = np.random.default_rng(0)
    return [
        {"a": generator.normal(size=4), "b": generator.normal(size=4) * 10 ** (2 * math.sin(t)), "c": np.ones(4)}
        for t in range(12)
    ]


def test_terms_have_the_numbers_of_the_term_splitter():
    w = nn.Parameter(torch.zeros(4))
    splitter, state = TermSplitter([w], weights={"c": 0.5}), None
    step = jax.jit(lambda terms, state: split_terms(terms, state, weights={"c": 0.5}))
    for place, terms in enumerate(_histories()):
        if place == 5:
            terms["b"] = terms["b"] * math.nan
        w.grad = None
        splitter.backward(**{name: (w * torch.tensor(g, dtype=torch.float32)).sum() for name, g in terms.items()})
        total, state = step({name: {"w": jnp.asarray(g, jnp.float32)} for name, g in terms.items()}, state)
        np.testing.assert_allclose(total["w"], w.grad.numpy(), rtol=2e-5, atol=1e-6)
        assert [row.scale for row in splitter.rows()] == pytest.approx(
            [float(x) for x in state.scale.values()], rel=1e-4
        )


def test_terms_that_lag_behind_have_the_limits_of_the_term_splitter():
    w = nn.Parameter(torch.zeros(3))
    splitter, state = TermSplitter([w]), None
    for values in values_of_terms()[:25]:
        w.grad = None
        gradients = {name: jnp.full(3, 10.0**k) for k, name in enumerate(values)}
        splitter.backward(**{name: w.sum() * 10.0**k + value for k, (name, value) in enumerate(values.items())})
        total, state = split_terms(gradients, state, values=values)
        np.testing.assert_allclose(total, w.grad.numpy(), rtol=1e-5)
        assert [row.scale for row in splitter.rows()] == pytest.approx(
            [float(x) for x in state.scale.values()], rel=1e-4
        )
    assert float(state.scale["stuck"]) > 0.2, "0.1 without relief"


def test_a_term_of_zero_and_a_norm_that_would_overflow():
    terms = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 3e30]), "c": jnp.zeros(2)}
    total, state = split_terms(terms)
    np.testing.assert_allclose(total, [1.0, 1.0], rtol=1e-6)
    assert float(state.maximum["c"]) == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_halves_are_multiplied_in_float32(dtype):
    """A factor that float16 does not hold, and a running maximum that bfloat16 would never lower."""
    small, large = jnp.full(3, 1e-3, dtype), jnp.full(3, 6e4, dtype)
    total, state = split_terms({"a": small, "b": large}, values={"a": dtype(1.0), "b": dtype(1.0)})
    np.testing.assert_allclose(np.asarray(total, np.float64), 2e-3, rtol=0.01)
    for _ in range(100):
        _, state = split_terms({"a": small, "b": large}, state, values={"a": dtype(0.5), "b": dtype(1.0)})
    assert float(state.worst["a"]) == pytest.approx(0.999**100, rel=1e-4)
    mean, _ = split_samples(jnp.stack([small, small, large, small, small]), quantile=0.5, factor=3.0)
    np.testing.assert_allclose(np.asarray(mean, np.float64), (4 + 3) * 1e-3 / 5, rtol=0.01)


def test_samples_follow_the_formula():
    generator = np.random.default_rng(1)
    batches = [generator.normal(size=(9, 3, 2)) * np.exp(generator.normal(size=(9, 1, 1))) for _ in range(6)]
    norms = [np.sqrt((b**2).sum((1, 2))) for b in batches]
    found = limits([n.tolist() for n in norms], 0.5, 1.5, 0.1, 0.1, 1.25)
    state = None
    step = jax.jit(lambda g, s: split_samples(g, s, quantile=0.5, factor=1.5, up=0.1, down=0.1))
    for batch, norm, limit in zip(batches, norms, found, strict=True):
        mean, state = step({"w": jnp.asarray(batch)}, state)
        expected = (batch * np.minimum(1, limit / norm)[:, None, None]).mean(0)
        np.testing.assert_allclose(mean["w"], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.ratio["w"], norm / limit, rtol=1e-4)


def test_a_bad_sample_leaves_the_gradient_of_the_others():
    def loss(params, x):
        return jnp.square(jnp.tanh(x @ params["low"]) @ params["high"]).sum()

    generator = np.random.default_rng(2)
    params = {"low": jnp.asarray(generator.normal(size=(3, 4))), "high": jnp.asarray(generator.normal(size=(4, 2)))}
    x = generator.normal(size=(6, 3))
    good = [0, 1, 3, 4, 5]
    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    expected = jax.tree_util.tree_map(lambda g: g.sum(0) / 6, each(params, jnp.asarray(x[good])))
    x[2, 0] = math.nan
    mean, state = split_samples(each(params, jnp.asarray(x)), factor=1e6)
    for name, value in mean.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)
        assert np.isnan(state.ratio[name]).nonzero()[0].tolist() == [2]


def test_the_defaults_are_those_of_classification():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(split_samples).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert defaults == dataclasses.asdict(RULES["classification"])


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="at least one term"):
        split_terms({})
    with pytest.raises(ValueError, match=r"one entry per sample"):
        split_samples({"w": jnp.ones(())})
    with pytest.raises(ValueError, match=r"\[\(3, 2\), \(4,\)\]"):
        split_samples([jnp.ones((3, 2)), jnp.ones(4)])
    with pytest.raises(ValueError, match="empty batch"):
        split_samples({"w": jnp.ones((0, 2))})
