"""The fork rule, the guard, the norms and the operator norm against independent float64 oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsplit.budget.base import limits_after
from gradsplit.budget.running_median import RunningMedian
from gradsplit.chain.chain_splitter import ModuleLimits
from gradsplit.chain.factors import operator_norm
from gradsplit.chain.forks import fork_limit, remember_branch
from gradsplit.chain.signal_limits import apply_scale, scale_within, signal_norm
from gradsplit.xp import numpy_xp

norms = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


@given(norms)
def test_a_branch_remembers_its_slowly_decaying_maximum(seen: list[float]) -> None:
    memory, expected = torch.zeros((), dtype=torch.float64), 0.0
    for norm in seen:
        memory = remember_branch(memory, torch.tensor(norm, dtype=torch.float64))
        expected = norm if expected == 0 else min(max(norm, 0.999 * expected), 1.05 * expected)
        assert float(memory) == pytest.approx(expected, rel=1e-12)


def test_a_branch_that_is_not_finite_teaches_nothing() -> None:
    for value in (math.nan, math.inf):
        assert float(remember_branch(torch.tensor(2.0), torch.tensor(value))) == 2.0


def test_the_fork_limit_leaves_out_branches_that_have_not_begun() -> None:
    assert float(fork_limit(torch.tensor([0.0, 5.0, 3.0]))) == 3.0
    assert math.isinf(float(fork_limit(torch.zeros(2))))


@given(norms)
def test_the_guard_is_three_times_a_geometric_median(seen: list[float]) -> None:
    median, kept = 0.0, []
    for count, norm in enumerate(seen):
        kept.append(min(norm, 3 * median) if median else norm)
        if count < 3:
            median = sorted(kept)[len(kept) // 2 if count != 1 else 0]
            continue
        eta = 0.5 if count < 20 else 0.05
        rate = math.exp(eta / 2)
        median = median * rate if norm > median else median / rate
    (limit,) = limits_after(RunningMedian(3.0), [np.array([value]) for value in seen])
    assert limit == pytest.approx(3 * median, rel=1e-9)


def test_a_history_that_began_with_one_norm_is_still_loaded() -> None:
    saved = (np.array([0.0, 2.0, 4.0]), np.array([0.0, 1.0, 50.0]))
    median, high, count = RunningMedian().restored(numpy_xp, saved)
    assert (median.tolist(), high.tolist(), count.tolist()) == ([0.0, 2.0, 4.0], [0.0] * 3, [0.0, 3.0, 50.0])


def test_the_median_settles_at_the_true_median() -> None:
    draw = np.random.default_rng(0)
    values = np.exp(draw.normal(size=4000))
    limits = [
        float(limits_after(RunningMedian(3.0), [np.array([v]) for v in values[:n]])[0]) for n in range(3000, 4000, 100)
    ]
    assert 0.85 < np.mean(limits) / 3 < 1.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_match_float64(dtype: torch.dtype) -> None:
    signal = torch.randn(5, 7).to(dtype)
    expected = signal.double().norm()
    assert float(signal_norm(signal)) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(signal_norm(signal, True).double(), signal.double().norm(dim=1), rtol=1e-5, atol=0)


def test_entries_whose_squares_overflow_are_measured_and_bounded() -> None:
    signal = torch.full((4,), 1e30)
    norm = signal_norm(signal)
    assert float(norm) == pytest.approx(2e30, rel=1e-6)
    scale, finite = scale_within(norm, torch.tensor(2.0))
    bounded = apply_scale(signal, scale, finite)
    assert bounded is not None and float(bounded.norm()) == pytest.approx(2.0, rel=1e-5)


def test_zeros_are_written_where_a_signal_is_not_finite() -> None:
    signal = torch.tensor([1.0, math.nan, math.inf])
    scale, finite = scale_within(signal_norm(signal), torch.tensor(math.inf))
    bounded = apply_scale(signal, scale, finite)
    assert bounded is not None and bool((bounded == 0).all())


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_each_module_keeps_its_part_of_the_total(sizes: list[float]) -> None:
    owners = {}
    for size in sizes:
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.full((3,), size)
        owners[str(len(owners))] = [p]
    before = ModuleLimits(owners, total=2.0).bound_()
    limit = 2.0 / math.sqrt(len(sizes))
    for size, norm, (p,) in zip(sizes, before, owners.values(), strict=True):
        assert float(norm) == pytest.approx(size * math.sqrt(3), rel=1e-5)
        assert p.grad is not None
        assert float(p.grad.norm()) == pytest.approx(min(limit, size * math.sqrt(3)), rel=1e-5)


def test_a_module_that_is_not_finite_is_zeroed_and_the_others_are_not() -> None:
    broken, sound = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    broken.grad, sound.grad = torch.tensor([math.nan, 1.0]), torch.tensor([0.1, 0.1])
    ModuleLimits({"broken": [broken], "sound": [sound]}).bound_()
    assert broken.grad.tolist() == [0.0, 0.0] and sound.grad.tolist() == pytest.approx([0.1, 0.1])


def test_the_operator_norm_is_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 4, dtype=torch.float64)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = torch.tanh(matrix @ x)
    jacobian = torch.diag(1 - y.detach() ** 2) @ matrix
    (leaving,) = torch.autograd.grad(y, x, torch.randn(6, dtype=torch.float64), retain_graph=True)
    found = operator_norm([y], [(x, leaving)], iterations=200, tolerance=1e-9)
    assert found == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-4)
