"""The share step in numpy, torch and JAX ends where `gradsplit.GSO` does; each planted fault makes it end elsewhere."""

from __future__ import annotations

import importlib
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

import gradsplit as gs
from gradsplit.functional import Oriented, array_kinds, orientation_of, share, share_rule
from gradsplit.functional.share import newton_schulz
from gradsplit.plan import Layout
from gradsplit.xp import namespace
from tests.functional.share_runs import (
    BLOCKS,
    KINDS,
    LAYOUT,
    OWN_SHAPES,
    SHAPES,
    SHARE,
    STEPS,
    distance,
    gradients,
    in_torch,
    turned,
    turned_back,
    weights,
)

PLAIN = Oriented.plain(LAYOUT)
LAST = Oriented.of(OWN_SHAPES, orientation_of("last", call="test"))


def rule_of(oriented=PLAIN, change=lambda kinds: kinds, **options):
    kinds = change(array_kinds(oriented, kinds=KINDS, blocks=BLOCKS))
    return share_rule(gs.xsp(oriented.layout), kinds=kinds, oriented=oriented, **options)


def run(made, array):
    """The weights after every step, in numpy."""
    held, after = [array(w) for w in weights()], []
    state = made.init(held)
    for step in range(STEPS):
        now = [np.asarray(w) for w in held]
        changes, state, _ = made.update([array(g) for g in gradients(step, now)], state, held, SHARE)
        held = [w + change for w, change in zip(held, changes, strict=True)]
        after.append([np.asarray(w) for w in held])
    return after


def farthest(after):
    """The largest distance from torch over all steps."""
    return max(distance(ours, theirs) for ours, theirs in zip(after, in_torch()[0], strict=True))


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_twelve_steps_are_those_of_torch_s_gso(array):
    assert in_torch()[1] > 0, "the limit on growth binds somewhere"
    assert farthest(run(rule_of(), array)) < 1e-9


def test_twelve_steps_in_jax_are_those_of_torch_s_gso_in_one_compilation():
    with jax.enable_x64(True):
        made, traces, held, after = rule_of(LAST), [], [jnp.asarray(w) for w in turned(weights())], []

        @jax.jit
        def step(given, state, held, tau):
            traces.append(1)
            changes, state, _ = made.update(given, state, held, tau)
            return [w + change for w, change in zip(held, changes, strict=True)], state

        state = made.init(held)
        for i in range(STEPS):
            given = turned(gradients(i, turned_back(held)))
            held, state = step([jnp.asarray(g) for g in given], state, held, SHARE)
            after.append(turned_back(held))
    assert len(traces) == 1
    assert farthest(after) < 1e-9


FAULTS = {
    "no limit on growth": {"change": lambda kinds: [replace(kind, longest=np.inf) for kind in kinds]},
    "a grouped convolution as one matrix": {"change": lambda kinds: [replace(kind, blocks=1) for kind in kinds]},
    "vectors move as far as matrices": {"change": lambda kinds: [replace(kind, share=1.0) for kind in kinds]},
    "vectors are not held": {
        "change": lambda kinds: [replace(k, name="table" if k.name == "vector" else k.name) for k in kinds]
    },
    "a short row may stay short": {"change": lambda kinds: [replace(kind, least=1e-3) for kind in kinds]},
    "Adam for matrices": {"change": lambda kinds: [replace(kind, direction="adam") for kind in kinds]},
    "decay is left out": {"weight_decay": 0.0},
    "gradients enter unbounded": {"budget": gs.Fixed(float("inf"))},
    "the second memory is Adam's usual one": {"betas": (0.9, 0.999)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_constant_is_caught(fault):
    assert farthest(run(rule_of(**FAULTS[fault]), np.asarray)) > 1e-5


def _rows_walk(plan, *arguments, honest=share.decide_collectively, **named):
    decision, *more = honest(plan, *arguments, **named)
    norm_B = np.maximum(decision.norm_B, 1e-300)
    return gs.Decision(plan, norm_B, decision.finite_B, decision.scale_B, decision.limits), *more


def _four_steps(matrices):
    return newton_schulz(matrices, 4)


splitting = importlib.import_module("gradsplit.functional.splitting")  # the package has a function of this name
PLANTED = {
    "a row without a gradient walks on": (share, "decide_collectively", _rows_walk),
    "Newton-Schulz ends early": (share, "newton_schulz", _four_steps),
    "the collective rule never fires": (splitting, "COLLECTIVE", np.inf),
    "recent norms fall too fast": (splitting, "FALLS", 0.2),
    "what a batch scaled as a whole lets through": (splitting, "LET_THROUGH", 2.0),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_inside_is_caught(fault, monkeypatch):
    in_torch()
    module, name, wrong = PLANTED[fault]
    monkeypatch.setattr(module, name, wrong)
    assert farthest(run(rule_of(), np.asarray)) > 1e-6


def test_an_array_without_a_gradient_stays_and_so_does_its_memory():
    made, held = rule_of(), weights()
    state = made.init(held)
    given = gradients(0, held)
    given[4] = None
    changes, after, _ = made.update(given, state, held, SHARE)
    np.testing.assert_array_equal(changes[4], 0.0)
    np.testing.assert_array_equal(after.momenta[4], 0.0)
    assert after.ages_T.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert all(np.abs(change).max() > 0 for t, change in enumerate(changes) if t != 4)


def test_a_broken_row_stays_and_no_other_row_feels_it():
    """Adam's direction looks at one entry at a time, so others are the same to the bit; a matrix is one direction."""
    made = rule_of(change=lambda kinds: [replace(kind, direction="adam") for kind in kinds])
    held = weights()
    whole, _, _ = made.update(gradients(0, held), made.init(held), held, SHARE)
    broken = gradients(0, held)
    broken[4][2, 1] = np.nan
    changes, after, decision = made.update(broken, made.init(held), held, SHARE)
    np.testing.assert_array_equal(changes[4][2], 0.0)
    np.testing.assert_array_equal(after.momenta[4][2], 0.0)
    np.testing.assert_array_equal(np.delete(changes[4], 2, 0), np.delete(whole[4], 2, 0))
    assert int((~decision.finite_B).sum()) == 1


def test_every_row_of_a_matrix_moves_by_the_share_of_its_length():
    made = rule_of(weight_decay=0.0, change=lambda kinds: [replace(kind, longest=np.inf) for kind in kinds])
    held = weights()
    changes, _, _ = made.update(gradients(0, held), made.init(held), held, SHARE)
    moved, own = (np.linalg.norm(a.reshape(5, -1), axis=1) for a in (changes[1], held[1]))
    np.testing.assert_allclose(moved, SHARE * own, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(changes[6], axis=1), SHARE * 0.1 * 2.0, rtol=1e-12)  # begins at zero


def test_short_rows_count_as_less_where_both_sides_are_wide():
    layout = gs.Layout.from_shapes({"square": (128, 128), "down": (96, 384), "flat": (16, 256)})
    made, held = share_rule(gs.xsp(layout)), [np.zeros(shape) for shape in layout.shapes]
    given = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(layout.shapes)]
    changes, _, _ = made.update(given, made.init(held), held, SHARE)
    for change, counts_as in zip(changes, (0.8, 1.6, 1.6), strict=True):
        np.testing.assert_allclose(np.linalg.norm(change, axis=1), SHARE * counts_as, rtol=1e-9)


def test_half_precision_keeps_its_memory_in_float32():
    made = share_rule(gs.xsp(gs.Layout.from_shapes({"w": (2, 3)})))
    held = [jnp.ones((2, 3), jnp.bfloat16)]
    state = made.init(held)
    changes, state, _ = made.update([jnp.full((2, 3), 300.0, jnp.bfloat16)], state, held, 0.1)
    assert (changes[0].dtype, state.momenta[0].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [4.0, 1.0, np.nan, 3.0, 2.0], [np.nan, np.nan]])
def test_medians_are_torch_s(values):
    expected = torch.nanmedian(torch.tensor(values)).item()
    for array in (np.asarray(values), jnp.asarray(values), torch.tensor(values)):
        np.testing.assert_equal(float(namespace(array).median(array)), expected)


def test_kinds_come_from_shapes_and_what_is_said_of_paths():
    kinds = dict(zip(SHAPES, array_kinds(PLAIN, kinds=KINDS, blocks=BLOCKS), strict=True))
    found = {name: (kind.name, kind.direction, kind.blocks) for name, kind in kinds.items()}
    assert found == {
        "scale": ("vector", "adam", 1),
        "conv.kernel": ("matrix", "orthogonal", 1),
        "conv.bias": ("vector", "adam", 1),
        "grouped.kernel": ("matrix", "orthogonal", 2),
        "fc.kernel": ("matrix", "orthogonal", 1),
        "fc.bias": ("vector", "adam", 1),
        "fc2.kernel": ("matrix", "orthogonal", 1),
        "narrow.kernel": ("embedding", "adam", 1),
        "token.embedding": ("embedding", "adam", 1),
    }
    by_function = array_kinds(PLAIN, direction=lambda path, shape: "adam" if len(shape) == 4 else None)
    assert [kind.direction for kind in by_function][1:5] == ["adam", "adam", "adam", "orthogonal"]


def test_layers_stacked_along_axis_0_are_one_matrix_each():
    stacked = Oriented.of({"layers.kernel": (3, 4, 5)}, orientation_of({"layers.*": (0, -1)}, call="test"))
    (kind,) = array_kinds(stacked)
    assert (kind.name, kind.blocks) == ("matrix", 3)
    rng = np.random.default_rng(0)
    weight, gradient = rng.standard_normal((2, 3, 4, 5))
    together = share_rule(gs.xsp(stacked.layout), oriented=stacked)
    changes, _, _ = together.update([gradient], together.init([weight]), [weight], SHARE)
    one = Oriented.of({"kernel": (4, 5)}, orientation_of("last", call="test"))
    alone = share_rule(gs.xsp(one.layout), oriented=one)
    for i in range(3):
        expected, _, _ = alone.update([gradient[i]], alone.init([weight[i]]), [weight[i]], SHARE)
        np.testing.assert_allclose(changes[0][i], expected[0], rtol=1e-12)


ERRORS = {
    "a kind": (lambda: array_kinds(PLAIN, kinds={"*": "tensor"}), "expected one of matrix, embedding, vector for"),
    "a direction": (lambda: array_kinds(PLAIN, direction="sign"), "expected one of orthogonal, adam for 'scale'"),
    "a vector": (lambda: array_kinds(PLAIN, direction="orthogonal"), "expected an array with two dimensions or more"),
    "a pattern": (lambda: array_kinds(PLAIN, kinds={"head.*": "matrix"}), "expected a pattern that matches a path"),
    "blocks": (lambda: array_kinds(PLAIN, blocks={"fc.kernel": 2}), "a number that divides the 7 rows of 'fc.kernel'"),
    "a budget": (lambda: share_rule(gs.xsp(LAYOUT), gs.RelativeStep()), "expected budgets of gradients"),
    "a plan": (lambda: share_rule(gs.whole(LAYOUT)), "expected bins inside one array each"),
    "a memory": (lambda: share_rule(gs.xsp(LAYOUT), betas=(1.0, 0.9)), "expected two memories in [0, 1)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_the_rule_and_the_place(case):
    call, words = ERRORS[case]
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("rows", [1, 2, 15, 16])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_fewer_than_sixteen_rows_are_no_batch(make, rows):
    """Every row has jumped a hundredfold; a median of few rows says nothing of the batch."""
    ones_B, more_B = make(np.ones(rows)), make(np.append(np.full(rows, 100.0), 0.0))
    factor, recent_B = splitting.collective_factor(ones_B * 100.0, ones_B > 0, ones_B, ones_B[0] * 5.0)
    assert float(factor) == pytest.approx(0.01 if rows == 16 else 1.0)
    assert float(recent_B[0]) == pytest.approx(1.05 if rows == 16 else 2.0)
    before_B = make(np.ones(rows + 1))  # one more row, without a gradient, does not count
    factor, _ = splitting.collective_factor(more_B, more_B > 0, before_B, before_B[0] * 5.0)
    assert float(factor) == pytest.approx(0.01 if rows == 16 else 1.0)


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_a_deep_series_moves_by_the_shortened_share_of_torch_s_gso(array):
    """Gradients are the weights, of one length in every layer: 28 layers in series move by a quarter of the share."""
    rng = np.random.default_rng(0)
    shapes = {**{f"layer{k}.kernel": (3, 4) for k in range(28)}, "bias": (4,)}
    first = [rng.standard_normal(shape) for shape in shapes.values()]
    first = [w / np.linalg.norm(w) for w in first]
    given = [w + (0.1 * np.eye(3, 4) - 0.1 * (np.eye(3, 4) * w).sum() * w if w.ndim > 1 else 0.1) for w in first]
    given[0][1] = np.nan
    parameters = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in zip(shapes, first, strict=True)}
    optimizer = gs.GSO(list(parameters.items()), backend="reference")
    with jax.enable_x64(True):
        made, held = share_rule(gs.xsp(Layout.from_shapes(shapes))), [array(w.copy()) for w in first]
        state = made.init(held)
        for scale in (1.0, 0.5, 1000.0):
            changes, state, _ = made.update([array(g * scale) for g in given], state, held, 0.03)
            held = [w + change for w, change in zip(held, changes, strict=True)]
            for p, g in zip(parameters.values(), given, strict=True):
                p.grad = torch.from_numpy(g * scale)
            optimizer.step()
            assert 26 < float(state.series) < 28
            assert float(state.series) == pytest.approx(float(optimizer.records[0].series), rel=1e-6)
            for ours, theirs in zip(held, parameters.values(), strict=True):
                np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=1e-6, atol=1e-7)


def test_a_state_of_before_has_no_series_and_begins_one():
    made, held = rule_of(), [np.asarray(w) for w in weights()]
    state = made.init(held)
    before = share.ShareState(*state[:-1])
    ours, theirs = (made.update(gradients(0, held), one, held, SHARE)[1] for one in (before, state))
    assert float(ours.series) == float(theirs.series) > 0
