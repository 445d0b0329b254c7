"""Bins bounded while they are read: the same as measuring all, deciding, then scaling."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import gradsplit as gs
from gradsplit.budget.lines import line_table, lines_of
from gradsplit.kernels import BACKENDS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {"w": (7, 40), "b": (5,), "c": (6, 3, 2, 2), "t": (9, 33)}


def _pairs(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for name, shape in SHAPES.items():
        p = Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype))
        p.grad = (
            torch.randn(shape, generator=generator)
            * 10 ** torch.randn(shape[0], generator=generator).view(-1, *(1,) * (len(shape) - 1))
        ).to(dtype)
        pairs.append((name, p))
    pairs[3] = ("t", _turned(pairs[3][1]))
    return pairs


def _turned(p):
    turned = Parameter(p.detach().t().contiguous().t())
    turned.grad = p.grad.t().contiguous().t()
    return turned


def _apart(splitter):
    """The same splitter with a pass for the norms, a decision, and a pass for the scales."""
    splitter._split._lines = None
    return splitter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "budget", [gs.Fixed(1.0), gs.Relative(0.2), gs.RelativeStep(0.03), (gs.Fixed(2.0), gs.Relative(1.0))]
)
def test_one_go_gives_what_measuring_deciding_and_scaling_give(dtype, budget):
    results = []
    for way in (lambda s: s, _apart):
        pairs = _pairs(dtype)
        pairs[0][1].grad[2, 3] = float("nan")
        pairs[2][1].grad[1] = float("inf")
        pairs[3][1].data[4, 4] = float("inf")  # counts as weights of length zero
        pairs[1][1].grad = None
        sgd = torch.optim.SGD(
            [{"params": [pairs[0][1]], "lr": 0.1, "momentum": 0.5}, {"params": [p for _, p in pairs[1:]], "lr": 1.0}]
        )
        splitter = way(gs.GradientSplitter(pairs, budget=budget, optimizer=sgd, backend="numba"))
        record = splitter.step()
        results.append((pairs, record))
    (ours, record), (theirs, expected) = results
    for (name, p), (_, q) in zip(ours, theirs, strict=True):
        if q.grad is not None:
            tolerance = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(record.squares_B, expected.squares_B) or record.squares_B.isnan().any()
    for field in ("norm_B", "finite_B", "scale_B", "limit_B", "outcome_B"):
        torch.testing.assert_close(
            getattr(record.decision, field), getattr(expected.decision, field), rtol=1e-12, atol=0
        )
    assert set(record.decision.outcome_B.tolist()) == {0, 1, 2}, "the case does not show all outcomes"


def test_the_decision_is_the_same_whenever_it_is_looked_at():
    pairs = _pairs()
    record = gs.GradientSplitter(pairs, budget=gs.Relative(0.2), backend="numba").step()
    before = copy.deepcopy([p.detach() for _, p in pairs])
    expected = _apart(gs.GradientSplitter(_pairs(), budget=gs.Relative(0.2), backend="numba")).step()
    for _, p in pairs:  # what the optimizer does next must not be seen
        p.data.mul_(100.0)
        p.grad.zero_()
    assert all((a != p).any() for a, (_, p) in zip(before, pairs, strict=True))
    torch.testing.assert_close(record.decision.limit_B, expected.decision.limit_B)
    torch.testing.assert_close(record.decision.scale_B, expected.decision.scale_B)
    assert str(record) == str(expected)


def test_a_record_can_be_pickled_before_anybody_has_looked():
    record = gs.GradientSplitter(_pairs(), budget=gs.Fixed(1.0), backend="numba").step()
    again = pickle.loads(pickle.dumps(record))
    assert torch.equal(again.decision.scale_B, record.decision.scale_B)


def test_only_what_was_written_counts_as_changed():
    pairs = _pairs()
    versions = [p.grad._version for _, p in pairs]
    gs.GradientSplitter(pairs, budget=gs.Fixed(1e9), backend="numba").step()
    assert [p.grad._version for _, p in pairs] == versions
    gs.GradientSplitter(pairs, budget=gs.Fixed(1e-3), backend="numba").step()
    assert all(p.grad._version > v for (_, p), v in zip(pairs, versions, strict=True))


def _kernel(plan):
    return BACKENDS["numba"].make(plan, torch.device("cpu"))


def test_gradients_that_share_memory_are_all_measured_before_one_is_scaled():
    layout = gs.Layout.from_shapes({"a": (4, 8), "b": (4, 8)})
    memory = torch.ones(48)
    apart = [torch.ones(4, 8), torch.ones(4, 8)]
    shared = [memory[:32].view(4, 8), memory[16:].view(4, 8)]
    table = line_table(lines_of([("bin", gs.Fixed(0.1))]), np.full(2, 8.0))
    kernel = _kernel(gs.xsp(layout))
    for gradients in (apart, shared):  # new addresses must be looked at again
        squares_B, _ = kernel.bound_(gradients, None, table)
        assert squares_B.tolist() == [8.0] * 8


@pytest.mark.parametrize(
    "strategy",
    [gs.per_tensor, lambda layout: gs.xsp(layout, parts=3, axis=1), lambda layout: gs.xsp(layout, parts=2)],
    ids=["tensors", "columns", "halves"],
)
def test_bins_in_several_pieces_are_bounded_like_any_other(strategy):
    layout = gs.Layout.from_shapes({"a": (400, 400), "b": (33,)})
    results = []
    for way in (lambda s: s, _apart):
        pairs = []
        for i, shape in enumerate(layout.shapes):
            p = Parameter(torch.ones(shape))
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            pairs.append((layout.names[i], p))
        pairs[0][1].grad[0, 0] = float("inf")
        record = way(gs.GradientSplitter(pairs, plan=strategy, budget=gs.Relative(0.2), backend="numba")).step()
        results.append(([p.grad for _, p in pairs], record.decision))
    (ours, decision), (theirs, expected) = results
    for g, h in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-6, atol=0)
    torch.testing.assert_close(decision.scale_B, expected.scale_B, rtol=1e-12, atol=0)
    assert {1, 2} <= set(decision.outcome_B.tolist()), "nothing was bounded"


def test_a_bin_over_two_tensors_has_no_lines_of_one():
    layout = gs.Layout.from_shapes({"a": (4, 4), "b": (4, 4)})
    gradients = [torch.ones(4, 4), torch.ones(4, 4)]
    assert (
        _kernel(gs.whole(layout)).bound_(
            gradients, None, line_table(lines_of([("bin", gs.Fixed(0.1))]), np.full(2, 8.0))
        )
        is None
    )
    assert all((g == 1).all() for g in gradients), "nothing may be half applied"


def test_raising_leaves_the_gradients_as_they_were():
    pairs = _pairs()
    pairs[1][1].grad[0] = float("nan")
    before = [p.grad.clone() for _, p in pairs]
    splitter = gs.GradientSplitter(pairs, budget=gs.Fixed(1e-3), on_nonfinite="raise", backend="numba")
    with pytest.raises(FloatingPointError):
        splitter.step()
    for (_, p), g in zip(pairs, before, strict=True):
        np.testing.assert_array_equal(p.grad.numpy(), g.numpy())


def test_a_budget_that_looks_beyond_the_bin_is_no_line():
    assert lines_of([("bin", gs.Relative(0.2)), ("bin", gs.RelativeStep())]) is not None
    for level, budget in (("root", gs.Fixed(1.0)), ("bin", gs.Ema(1.5)), ("bin", gs.Fixed((1.0, 2.0)))):
        assert lines_of([(level, budget)]) is None


def test_a_rule_changed_in_a_subclass_has_no_line():
    class Doubled(gs.Relative):
        def limits(self, xp, reading, state):
            return 2 * super().limits(xp, reading, state)

    assert lines_of([("bin", gs.Relative(0.2))]) is not None
    assert lines_of([("bin", Doubled(0.2))]) is None
