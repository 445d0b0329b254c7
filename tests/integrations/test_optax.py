"""The optax adapter: the functional core's numbers under optax's protocol, compiled once, chained, mapped, restored."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import gradsplit as gs
from gradsplit.integrations.optax import SplitTransformation, cap_updates, energies_of, gso, layout_of, split_gradients
from tests.functional import in_torch, share_runs
from tests.functional.cases import (
    CASES,
    LAYOUT,
    LR,
    MOMENTUM,
    NUM_STEPS,
    gradients,
    turned,
    turned_back,
    weights,
)


def tree(arrays):
    """Arrays of the shared cases, output units last, nested by their dotted names."""
    made = {}
    for name, array in zip(LAYOUT.names, turned(arrays), strict=True):
        *path, leaf = name.split(".")
        at = made
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = jnp.asarray(array)
    return made


def arrays_of(params):
    """The way back, in the cases' order."""
    made = []
    for name in LAYOUT.names:
        at = params
        for part in name.split("."):
            at = at[part]
        made.append(at)
    return turned_back(made)


def schedule(step):
    return LR * 0.99**step


def in_tree_order(layout):
    """A dict's leaves come sorted by name; where the cases' bins of rows stand then."""
    ours = [one.name for one in gs.xsp(layout).bins]
    theirs = [one.name for one in gs.xsp(LAYOUT).bins]
    return [theirs.index(name) for name in ours]


def test_names_are_dotted_paths_and_rows_are_output_units():
    layout = layout_of(tree(weights()))
    assert dict(zip(layout.names, layout.shapes, strict=True)) == dict(zip(LAYOUT.names, LAYOUT.shapes, strict=True))


@pytest.mark.parametrize("budget", ["relative_step", "ema"])
def test_fifty_steps_give_torch_s_scales_in_one_compilation(budget):
    case = CASES[f"xsp / {budget}"]
    split = split_gradients("xsp", case.budget, learning_rate=schedule, momentum=MOMENTUM)
    params, traces = tree(weights()), []

    @jax.jit
    def step(given, state):
        traces.append(1)
        return split.update(given, state, params)

    state = split.init(params)
    order = in_tree_order(layout_of(params))
    for i in range(NUM_STEPS):
        _, state = step(tree(gradients(i)), state)
        np.testing.assert_allclose(state.last.scale_B, in_torch.scales(f"xsp / {budget}")[i][order], rtol=0, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("second_moment", ["element", "bin"])
def test_a_run_of_gso_ends_at_torch_s_weights_in_one_compilation(second_moment):
    optimizer, traces = (
        gso(lambda step: in_torch.GSO_LR * 0.99**step, direction="adam", second_moment=second_moment),
        [],
    )

    @jax.jit
    def step(given, state, params):
        traces.append(1)
        updates, state = optimizer.update(given, state, params)
        return optax.apply_updates(params, updates), state

    params = tree(weights())
    state = optimizer.init(params)
    for i in range(in_torch.GSO_STEPS):
        params, state = step(tree(in_torch.gso_gradients(i, arrays_of(params))), state, params)
    assert len(traces) == 1
    for ours, theirs in zip(arrays_of(params), in_torch.after_gso(second_moment), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def share_tree(arrays):
    """The arrays of the share runs, output units last, nested by their dotted names."""
    made = {}
    for name, array in zip(share_runs.SHAPES, share_runs.turned(arrays), strict=True):
        module, _, leaf = name.rpartition(".")
        (made.setdefault(module, {}) if module else made)[leaf] = jnp.asarray(array)
    return made


def small_share_tree(arrays):
    """A matrix with its bias, one that begins at zero, and an embedding: as few as one compilation is to be short."""
    return {module: leaves for module, leaves in share_tree(arrays).items() if module in ("fc", "fc2", "token")}


def share_arrays(params):
    made = []
    for name in share_runs.SHAPES:
        module, _, leaf = name.rpartition(".")
        made.append((params[module] if module else params)[leaf])
    return share_runs.turned_back(made)


def share_run(optimizer, steps=share_runs.STEPS, resume_at=None):
    """Weights after every step, and how often the step was traced; the state passes through numpy where asked."""
    traces, after = [], []

    @jax.jit
    def step(given, state, params):
        traces.append(1)
        updates, state = optimizer.update(given, state, params)
        return optax.apply_updates(params, updates), state

    params = share_tree(share_runs.weights())
    state = optimizer.init(params)
    for i in range(steps):
        if i == resume_at:
            state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state))
        params, state = step(share_tree(share_runs.gradients(i, share_arrays(params))), state, params)
        after.append(share_arrays(params))
    return after, len(traces)


def test_twelve_steps_by_shares_are_those_of_torch_s_gso_in_one_compilation():
    """Embeddings are told by their name, all else by the shapes; the state round trips in the middle."""
    with jax.enable_x64(True):
        after, traces = share_run(gso(share_runs.SHARE, blocks=share_runs.BLOCKS), resume_at=5)
    assert traces == 1
    expected, _ = share_runs.in_torch()
    assert max(share_runs.distance(ours, theirs) for ours, theirs in zip(after, expected, strict=True)) < 1e-9


def test_blocks_that_are_left_out_are_seen():
    with jax.enable_x64(True):
        after, _ = share_run(gso(share_runs.SHARE), steps=2)
    assert share_runs.distance(after[1], share_runs.in_torch()[0][1]) > 1e-5


def test_an_injected_share_moves_the_step_without_compiling_again():
    params = small_share_tree(share_runs.weights())
    given = small_share_tree(share_runs.gradients(0, share_runs.weights()))
    optimizer, traces = optax.inject_hyperparams(gso)(learning_rate=0.06, weight_decay=0.0), []

    @jax.jit
    def step(state):
        traces.append(1)
        return optimizer.update(given, state, params)

    first, _ = step(optimizer.init(params))
    state = optimizer.init(params)
    state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] / 2
    second, _ = step(state)
    assert len(traces) == 1
    np.testing.assert_allclose(second["fc2"]["kernel"] * 2, first["fc2"]["kernel"], rtol=1e-5)
    length = np.linalg.norm(first["fc2"]["kernel"], axis=0)  # begins at zero, so counts as 0.1 per entry
    np.testing.assert_allclose(length, 0.06 * 0.1 * 2.0, rtol=1e-5)


def test_a_schedule_may_be_the_share_and_0_03_is_the_default():
    params = {"kernel": jnp.eye(3) * 2.0}
    given = {"kernel": jnp.arange(9.0).reshape(3, 3) - 4.5}
    moved = []
    for optimizer in (gso(weight_decay=0.0), gso(lambda step: 0.03 / (1 + step), weight_decay=0.0)):
        updates, state = optimizer.update(given, optimizer.init(params), params)
        moved.append(np.linalg.norm(updates["kernel"], axis=0))
    again, _ = optimizer.update(given, state, params)
    np.testing.assert_allclose(moved, np.full((2, 3), 0.06), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(again["kernel"], axis=0), 0.03, rtol=1e-5)


def test_what_is_said_of_a_path_goes_before_its_shape():
    """A matrix of Adam keeps a mean square, and an orthogonal one keeps none."""
    params = {"gate": {"kernel": jnp.ones((3, 4))}, "up": {"kernel": jnp.ones((3, 4))}}

    def shapes(optimizer):
        return [a.shape for a in jax.tree.leaves(optimizer.init(params).nu)]

    assert shapes(gso()) == []
    assert shapes(gso(direction={"gate.*": "adam"})) == [(3, 4)]
    assert shapes(gso(kinds=lambda path, shape: "embedding" if path.startswith("up") else None)) == [(3, 4)]
    assert shapes(gso(direction={"*": "adam"})) == [(3, 4), (3, 4)]


def test_a_run_by_shares_says_what_was_bounded():
    optimizer, params = gso(), small_share_tree(share_runs.weights())
    given = small_share_tree(share_runs.gradients(0, share_runs.weights()))
    given["fc"]["kernel"] = given["fc"]["kernel"].at[1, 3].set(jnp.nan)
    updates, state = jax.jit(optimizer.update)(given, optimizer.init(params), params)
    worst = optimizer.record(state, params).worst(1)[0]
    assert (worst.name, worst.outcome) == ("fc.kernel[3:4]", gs.Outcome.ZEROED)
    assert bool(jnp.isfinite(updates["fc"]["kernel"]).all())
    np.testing.assert_array_equal(updates["fc"]["kernel"][:, 3], 0.0)


def test_seeds_of_a_vmap_step_by_themselves():
    optimizer, params = gso(), small_share_tree(share_runs.weights())
    seeds = [small_share_tree(share_runs.gradients(k, share_runs.weights())) for k in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    state = optimizer.init(params)
    mapped, _ = jax.jit(jax.vmap(lambda given: optimizer.update(given, state, params)))(stacked)
    for k, seed in enumerate(seeds):
        alone, _ = jax.jit(optimizer.update)(seed, state, params)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=0, atol=1e-5)


def test_without_a_binding_limit_gso_is_adamw():
    params = tree(weights())
    ours, theirs = gso(1e-2, budget=gs.Fixed(float("inf")), direction="adam"), optax.adamw(1e-2, weight_decay=1e-2)
    a, b = ours.init(params), theirs.init(params)
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    for i in range(5):
        given = tree([np.nan_to_num(g, posinf=1.0) for g in gradients(i)])
        ours_now, a = step(given, a, params)
        theirs_now, b = their_step(given, b, params)
        for x, y in zip(jax.tree.leaves(ours_now), jax.tree.leaves(theirs_now), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-9)


def test_it_chains_with_a_clip_and_adamw_and_says_what_it_did():
    split = split_gradients("xsp", gs.Relative(0.02))
    optimizer = optax.chain(split, optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = tree(weights())
    given = tree(weights(9))
    given["body"]["fc1"]["weight"] = given["body"]["fc1"]["weight"].at[2, 3].set(jnp.nan)
    updates, state = jax.jit(optimizer.update)(given, optimizer.init(params), params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    record = split.record(state, params)
    assert record.worst(1)[0].name == "body.fc1.weight[3:4]"
    assert record.worst(1)[0].outcome == gs.Outcome.ZEROED
    assert record.step == 0
    assert "scaled" in str(record)


def test_a_bin_within_its_limit_keeps_its_bits_and_a_broken_one_touches_no_other():
    split = split_gradients("xsp", gs.Fixed(1e3))
    params, given = tree(weights()), tree(weights(3))
    broken = jax.tree.map(lambda g: g, given)
    broken["stem"]["conv"]["weight"] = broken["stem"]["conv"]["weight"].at[0, 0, 0, 1].set(jnp.inf)
    kept, _ = jax.jit(split.update)(broken, split.init(params), params)
    expected = given["stem"]["conv"]["weight"].at[..., 1].set(0.0)
    np.testing.assert_array_equal(kept["stem"]["conv"]["weight"], expected)
    np.testing.assert_array_equal(kept["body"]["fc1"]["weight"], given["body"]["fc1"]["weight"])


def test_half_precision_gradients_are_measured_in_float32():
    given = {"kernel": jnp.full((64, 2), 300.0, jnp.bfloat16)}
    split = split_gradients("xsp", gs.Fixed(1.0))
    bounded, state = split.update(given, split.init(given))
    assert bounded["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.last.norm_B, [2400.0, 2400.0])  # float16's largest number is 65504
    np.testing.assert_allclose(np.asarray(bounded["kernel"], np.float32), 0.125, rtol=0.01)


@pytest.mark.parametrize("size", [3e38, 1e30, 1e19])
@pytest.mark.parametrize("budget", [gs.Fixed(1.0), {"root": gs.Fixed(1.0)}], ids=["bins", "root"])
def test_entries_as_large_as_float32_holds_do_not_overflow(size, budget):
    given = {"a": jnp.ones((4, 3)).at[0, 0].set(size), "b": jnp.ones(5)}
    split = split_gradients("xsp", budget)
    bounded, state = jax.jit(split.update)(given, split.init(given))
    np.testing.assert_allclose(state.last.norm_B, [size, 2, 2, 5**0.5], rtol=1e-6)
    assert bool(state.last.finite_B.all())
    assert float(optax.tree.norm(bounded)) <= (1.0 if isinstance(budget, dict) else 2.0) * (1 + 1e-6)


def test_each_seed_of_a_vmap_is_bounded_by_itself():
    split, params = split_gradients("xsp", gs.Ema(1.2, warmup=1)), tree(weights())
    seeds = [tree([g * np.float32(10**k) for g in weights(20 + k)]) for k in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    start = jax.vmap(lambda _: split.init(params))(jnp.arange(3))
    update, one_seed = jax.jit(jax.vmap(split.update)), jax.jit(split.update)
    mapped, state = update(stacked, start)
    mapped, state = update(jax.tree.map(lambda g: g * 2, stacked), state)
    for k, seed in enumerate(seeds):
        _, alone = one_seed(seed, split.init(params))
        bounded, alone = one_seed(jax.tree.map(lambda g: g * 2, seed), alone)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(bounded), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-6)
        one = jax.tree.map(lambda leaf, k=k: leaf[k], state)
        assert split.record(one, params).worst(1)[0].name == split.record(alone, params).worst(1)[0].name


def test_a_cap_bounds_the_update_of_any_optimizer():
    params = tree(weights())
    optimizer = optax.chain(optax.adam(1.0), cap_updates("xsp", gs.RelativeStep(0.03)))
    updates, _ = jax.jit(optimizer.update)(tree(weights(4)), optimizer.init(params), params)
    for u, w in zip(arrays_of(updates), arrays_of(params), strict=True):
        u, w = (a.reshape(len(a), -1) if a.ndim > 1 else a.reshape(1, -1) for a in (u, w))
        length, own = np.linalg.norm(u, axis=1), np.linalg.norm(w, axis=1)
        limit = 0.03 * np.maximum(own, 0.01 * w.shape[1] ** 0.5)
        assert (length <= limit * (1 + 1e-5)).all()
        np.testing.assert_allclose(length, limit, rtol=1e-4)  # Adam's first step at rate 1 is far above


def test_going_on_from_a_saved_state_changes_nothing():
    """A state is a tree of arrays: what a checkpoint keeps is all that the next step depends on."""
    params = tree(weights())

    def make():
        return optax.chain(
            split_gradients("xsp", gs.Ema(1.1, warmup=2)), gso(1e-2, direction="adam", second_moment="bin")
        )

    whole, state = make(), None
    state = whole.init(params)
    step, later_step = jax.jit(whole.update), jax.jit(make().update)
    for i in range(4):
        _, state = step(tree(gradients(i)), state, params)
    saved = jax.tree.map(np.asarray, state)
    resumed = jax.tree.map(jnp.asarray, saved)
    for i in range(4, 8):
        a, state = step(tree(gradients(i)), state, params)
        b, resumed = later_step(tree(gradients(i)), resumed, params)
    for x, y in zip(jax.tree.leaves((a, state)), jax.tree.leaves((b, resumed)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_learning_rate_may_be_injected_and_change_without_compiling_again():
    params, traces = tree(weights()), []
    optimizer = optax.inject_hyperparams(gso)(learning_rate=1e-2)

    @jax.jit
    def step(given, state):
        traces.append(1)
        return optimizer.update(given, state, params)

    state = optimizer.init(params)
    first, state = step(tree(weights(4)), state)
    state.hyperparams["learning_rate"] = state.hyperparams["learning_rate"] * 0
    second, state = step(tree(weights(4)), state)
    assert len(traces) == 1
    assert float(optax.tree.norm(first)) > 0
    assert float(optax.tree.norm(second)) == 0


@pytest.mark.parametrize("make", [lambda: split_gradients("xsp", "fixed"), gso])
def test_a_part_of_the_parameters_that_was_stepped_says_what_it_did(make):
    """Behind multi_transform and masked the transformation sees a part of the tree."""
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "embedding": jnp.ones((5, 2))}
    labels = {"kernel": "split", "bias": "split", "embedding": "still"}
    split, gradients = make(), {**params, "kernel": jnp.asarray([[0.1, 9.0, 0.1], [0.1, 0.1, 0.1]])}
    wrapped = [
        optax.multi_transform({"split": split, "still": optax.set_to_zero()}, labels),
        optax.masked(split, {name: label == "split" for name, label in labels.items()}),
    ]
    for optimizer in wrapped:
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        record = split.record(state, params)
        assert record.plan.num_bins == 4
        assert record.worst(1)[0].name == "kernel[1:2]"


def test_lbf_cuts_by_energies_of_a_tree():
    params = tree(weights())
    energy = energies_of(jax.tree.map(lambda g: g**2, tree(weights(6))))
    plan = gs.lbf(layout_of(params), energy, max_bins=20, min_gain=0.0)
    split = split_gradients(plan, gs.Fixed(0.1))
    _, state = jax.jit(split.update)(tree(weights(6)), split.init(params), params)
    squares = sum(float((g.astype(np.float64) ** 2).sum()) for g in weights(6))
    np.testing.assert_allclose((np.asarray(state.last.norm_B, np.float64) ** 2).sum(), squares, rtol=1e-5)
    assert plan.num_bins == 20


@pytest.mark.parametrize(
    ("name", "shape", "orientation", "rows"),
    [
        ("kernel", (3, 8), "last", 8),
        ("kernel", (5, 5, 3, 16), "last", 16),
        ("bias", (8,), "last", 1),
        ("embedding", (100, 16), "last", 100),
        ("kernel", (100, 16), "first", 100),
        ("embedding", (100, 16), {"embedding": -1}, 16),
        ("depthwise", (3, 3, 8, 2), {"depthwise": (-2, -1)}, 16),
        ("stacked", (6, 3, 8), {"stacked": (0, -1)}, 48),
    ],
)
def test_each_output_unit_is_a_row(name, shape, orientation, rows):
    params = {name: jnp.ones(shape)}
    plan = split_gradients("xsp", gs.Fixed(1.0), orientation=orientation).plan_of(params)
    assert plan.num_bins == rows


@pytest.mark.parametrize(
    ("orientation", "axes"),
    [("last", (0,)), ("first", (1,)), ({"kernel": (0, 1)}, ())],
)
def test_a_row_s_norm_runs_over_all_other_axes(orientation, axes):
    given = {"kernel": jnp.asarray(weights()[2])}
    split = split_gradients("xsp", gs.Fixed(1.0), orientation=orientation)
    _, state = split.update(given, split.init(given))
    expected = np.sqrt((weights()[2] ** 2).sum(axis=axes) if axes else weights()[2] ** 2).ravel()
    np.testing.assert_allclose(state.last.norm_B, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda p: split_gradients("xsp", "relative_step").init(p),
            "split_gradients(learning_rate=None): expected a learning rate",
        ),
        (lambda p: split_gradients("rows", gs.Fixed(1.0)), "expected one of whole, per_tensor, xsp"),
        (
            lambda p: split_gradients("lbf", gs.Fixed(1.0)),
            "Pass gradsplit.lbf(layout_of(params), energies_of(squares))",
        ),
        (lambda p: split_gradients(momentum=1.0), "split_gradients(momentum=1.0): expected a number in [0, 1)"),
        (lambda p: split_gradients("xsp", "fixed", orientation="rows"), "orientation='rows'): expected 'last'"),
        (
            lambda p: split_gradients("xsp", "fixed", orientation={"*": 7}).init(p),
            "expected different axes of an array",
        ),
        (
            lambda p: split_gradients("xsp", "fixed", rule="best").init(p),
            "split_gradients(rule='best'): expected one of",
        ),
        (lambda p: split_gradients("xsp", "fixed").init({}), "expected a tree with parameters"),
        (
            lambda p: (s := split_gradients("xsp", "relative")).update(p, s.init(p)),
            "Call update(updates, state, params)",
        ),
        (lambda p: (s := gso(0.1)).update(p, s.init(p)), "Call update(updates, state, params)"),
        (
            lambda p: (s := gso(0.1)).update({"kernel": p["kernel"], "bias": None}, s.init(p), p),
            "two trees that differ in 'bias'",
        ),
        (
            lambda p: (s := split_gradients("xsp", "relative")).update({"kernel": p["kernel"]}, s.init(p), p),
            "two trees that differ in 'bias'",
        ),
        (lambda p: gso(0.1, b1=1.0).init(p), "gso(betas=(1.0, 0.99)): expected two memories in [0, 1)"),
        (
            lambda p: gso(0.1, direction="adam", second_moment="row").init(p),
            "gso(second_moment='row'): expected 'element' or 'bin'",
        ),
        (
            lambda p: gso(0.1, "whole", direction="adam", second_moment="bin").init(p),
            "expected bins inside one tensor each",
        ),
        (lambda p: gso(0.1).record(optax.adam(1.0).init(p), p), "expected the state of one transformation"),
        (
            lambda p: split_gradients(gs.xsp(LAYOUT), "fixed").init(p),
            "expected a plan of this model",
        ),
    ],
)
def test_an_error_names_the_call_and_the_remedy(call, words):
    with pytest.raises(ValueError) as caught:
        call({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: split_gradients("xsp", "fixed").init({"n": jnp.zeros(3, int)}), "got int32 at 'n'"),
        (lambda: gso(0.1).init({"z": jnp.zeros(3, complex)}), "got complex64 at 'z'"),
        (lambda: split_gradients("xsp", "fixed", orientation=3), "orientation=3): expected 'last'"),
    ],
)
def test_a_wrong_kind_is_named(call, words):
    with pytest.raises(TypeError) as caught:
        call()
    assert words in str(caught.value)


def test_complex_gradients_are_split_by_their_modulus():
    given = {"z": jnp.asarray([3.0 + 4.0j, 0.0])}
    split = split_gradients("xsp", gs.Fixed(1.0))
    bounded, _ = split.update(given, split.init(given))
    np.testing.assert_allclose(bounded["z"], [0.6 + 0.8j, 0.0], rtol=1e-6)


def test_the_transformation_is_a_link_like_any_other():
    split = split_gradients("xsp", gs.Fixed(1.0))
    assert isinstance(split, SplitTransformation)
    assert isinstance(split, optax.GradientTransformationExtraArgs)
    masked = optax.masked(split, {"a": True, "b": False})
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    updates, _ = masked.update(params, masked.init(params))
    np.testing.assert_allclose(updates["a"], 0.5)
    np.testing.assert_allclose(updates["b"], 1.0)


def test_project_runs_inside_a_compiled_function_by_both_rules():
    plan = gs.tree_sp(LAYOUT, inner="xsp")
    rng = np.random.default_rng(0)
    norm_B = rng.exponential(size=plan.num_bins).astype(np.float32)
    limit_N = rng.exponential(size=plan.num_nodes).astype(np.float32)
    for rule in ("bottom_up", "nearest"):
        ours = jax.jit(lambda n, lim, rule=rule: gs.project(plan, n, lim, rule=rule))(norm_B, limit_N)
        theirs = gs.project(plan, norm_B.astype(np.float64), limit_N.astype(np.float64), rule=rule)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expected limits >= 0, where inf means unbounded, got -1"):
        gs.project(plan, jnp.asarray(norm_B), jnp.asarray(limit_N).at[3].set(-1.0))


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_a_missing_package_is_named_with_what_to_install(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; import gradsplit.integrations.optax"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "expected the packages jax and optax. Run: pip install 'gradsplit[jax]'" in done.stderr
