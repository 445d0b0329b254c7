"""Both rules from limits to scales: the nearest one against a generic convex solver, the errors of `project`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import gradsplit as gs
from gradsplit.plan import Layout
from tests.laws.oracles import bins_below, bottom_up_scales, node_norms


def random_tree(rng):
    """A plan of 2 to 7 bins below up to three levels of modules."""
    names = set()
    for _ in range(int(rng.integers(2, 8))):
        path = [str(rng.choice(list("ab"))) for _ in range(int(rng.integers(0, 4)))]
        names.add(".".join([*path, f"t{len(names)}"]))
    return gs.tree_sp(Layout.from_shapes(dict.fromkeys(sorted(names), (1,))))


def solve(plan, norm_B, limit_N):
    """Nearest point of the nested balls by sequential quadratic programming, which knows nothing of trees."""
    bound = [node for node in range(plan.num_nodes) if np.isfinite(limit_N[node])]
    member = np.zeros((len(bound), plan.num_bins))
    for row, node in enumerate(bound):
        member[row, bins_below(plan)[node]] = 1.0
    limit2 = limit_N[bound] ** 2
    constraints = []
    if bound:
        constraints = [
            {
                "type": "ineq",
                "fun": lambda x: limit2 - member @ x**2,
                "jac": lambda x: -2 * member * x,
            }
        ]
    start = norm_B * bottom_up_scales(plan, norm_B, limit_N) * 0.99
    result = minimize(
        lambda x: ((x - norm_B) ** 2).sum(),
        start,
        jac=lambda x: 2 * (x - norm_B),
        constraints=constraints,
        bounds=[(0, n) for n in norm_B],
        method="SLSQP",
        options={"maxiter": 300, "ftol": 1e-13},
    )
    return result.x, max(0.0, float((member @ result.x**2 - limit2).max(initial=0.0)))


def random_limits(rng, plan):
    limit_N = np.exp(rng.uniform(-1.5, 1.0, plan.num_nodes))
    limit_N[rng.random(plan.num_nodes) < 0.3] = np.inf
    return limit_N


def test_the_nearest_rule_is_the_nearest_on_a_thousand_trees():
    rng = np.random.default_rng(7)
    compared = 0
    for _ in range(1000):
        plan = random_tree(rng)
        norm_B, limit_N = np.exp(rng.uniform(-1.5, 1.5, plan.num_bins)), random_limits(rng, plan)
        ours = norm_B * gs.project(plan, norm_B, limit_N, rule="nearest")
        assert (node_norms(plan, ours) <= limit_N * (1 + 1e-9)).all()
        theirs, violation = solve(plan, norm_B, limit_N)
        assert violation < 1e-6, "the solver did not end within the limits"
        distance, want = ((ours - norm_B) ** 2).sum(), ((theirs - norm_B) ** 2).sum()
        assert abs(distance - want) <= 1e-6 * max(1.0, want), f"{distance} against {want}"
        compared += bool(want > 1e-3)
    assert compared > 800, "most of the trees should have a limit that binds"


def test_bottom_up_ends_within_the_limits_on_a_thousand_trees_and_never_nearer():
    rng = np.random.default_rng(8)
    for _ in range(1000):
        plan = random_tree(rng)
        norm_B, limit_N = np.exp(rng.uniform(-2, 6, plan.num_bins)), random_limits(rng, plan)
        kept = norm_B * gs.project(plan, norm_B, limit_N)
        nearest = norm_B * gs.project(plan, norm_B, limit_N, rule="nearest")
        assert (node_norms(plan, kept) <= limit_N * (1 + 1e-12)).all()
        assert ((nearest - norm_B) ** 2).sum() <= ((kept - norm_B) ** 2).sum() * (1 + 1e-9)


def test_an_exploding_child_beside_a_healthy_one():
    """Norms 100 and 1, all limits 1: the nearest rule sacrifices the healthy child, bottom-up does not."""
    plan = gs.per_tensor(Layout.from_shapes({"a": (1,), "b": (1,)}))
    limit_N = np.where(plan.levels_N == 2, np.inf, 1.0)
    nearest = gs.project(plan, np.array([100.0, 1.0]), limit_N, rule="nearest")
    np.testing.assert_allclose(nearest, [1 / np.sqrt(10001)] * 2)
    kept = gs.project(plan, np.array([100.0, 1.0]), limit_N) * [100, 1]
    np.testing.assert_allclose(kept, [np.sqrt(0.5)] * 2)


def test_numpy_and_torch_give_the_same_scales():
    rng = np.random.default_rng(9)
    for rule, _ in itertools.product(("bottom_up", "nearest"), range(50)):
        plan = random_tree(rng)
        norm_B, limit_N = np.exp(rng.uniform(-2, 4, plan.num_bins)), random_limits(rng, plan)
        got = gs.project(plan, torch.from_numpy(norm_B), torch.from_numpy(limit_N), rule=rule)
        np.testing.assert_allclose(got.numpy(), gs.project(plan, norm_B, limit_N, rule=rule), rtol=1e-12)


def test_many_bins_below_one_root_and_many_small_nodes():
    """Sums inside a segment do not lose a small one that follows a large one."""
    layout = Layout.from_shapes({f"m{i}.w": (3, 1) for i in range(50)})
    plan = gs.tree_sp(layout, inner="xsp")
    scale = np.repeat(np.logspace(25, -25, 50), 3)
    norm_B = scale * np.tile([3.0, 4.0, 12.0], 50)
    limit_N = np.full(plan.num_nodes, np.inf)
    modules = plan.level_nodes("module")
    limit_N[modules] = np.logspace(25, -25, 50)
    for rule in ("bottom_up", "nearest"):
        np.testing.assert_allclose(gs.project(plan, norm_B, limit_N, rule=rule), 1 / 13.0, rtol=1e-9)


PLAN = gs.xsp(Layout.from_shapes({"w": (3, 2)}))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            (np.ones(2), np.ones(5)),
            ValueError,
            r"project\(norm_B=…\): expected shape \(3,\), one per bin of the plan, got \(2,\)",
        ),
        (
            (np.ones(3), np.ones(4)),
            ValueError,
            r"project\(limit_N=…\): expected shape \(5,\), one per node of the plan, got \(4,\)",
        ),
        ((np.ones(3), -np.ones(5)), ValueError, r"limits >= 0, where inf means unbounded, got -1.0 at '.*'. Make it 0"),
        ((np.ones(3), np.array([1, 1, 1, np.nan, 1])), ValueError, r"where inf means unbounded, got nan at 'w\[1:2\]'"),
        (
            ([1.0, 1.0, 1.0], np.ones(5)),
            TypeError,
            r"project\(norm_B=…\): expected an array of numpy, torch.*, got builtins.list",
        ),
    ],
)
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        gs.project(PLAN, *arguments)


def test_another_rule_is_refused():
    with pytest.raises(ValueError, match=r"project\(rule='closest'\): expected one of bottom_up, nearest"):
        gs.project(PLAN, np.ones(3), np.ones(5), rule="closest")


def test_a_child_that_keeps_much_more_than_the_limit_does_not_hide_its_small_siblings():
    """Found by fuzzing: the first child keeps 1 at scale 1e-12, the second would keep 1e9; (2 - 1) / 1e18 = t^2."""
    plan = gs.per_tensor(Layout.from_shapes({"a": (1,), "b": (1,)}))
    limit_N = np.full(plan.num_nodes, np.inf)
    limit_N[0], limit_N[plan.bin_nodes_B[0]] = np.sqrt(2.0), 1.0
    norm_B = np.array([1e12, 1e9])
    scale_B = gs.project(plan, norm_B, limit_N, rule="nearest")
    np.testing.assert_allclose(scale_B, [1e-12, 1e-9], rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(scale_B * norm_B), limit_N[0], rtol=1e-9)
