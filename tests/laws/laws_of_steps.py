"""What a step of a splitter must do. The subject is a function (pairs, plan, budget, **options) -> splitter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import gradsplit as gs
from gradsplit.plan import Layout, Plan
from tests.laws.cases import parameters, tensors
from tests.laws.oracles import label_elements, node_norms, scaled_by_labels, square_sums, to_numpy, tolerance_of

Make = Callable[..., Any]
Pairs = list[tuple[str, nn.Parameter]]


def _set(pairs: Pairs, gradients: list[torch.Tensor | None]) -> None:
    for (_, parameter), gradient in zip(pairs, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


def _now(pairs: Pairs) -> list[np.ndarray]:
    return [to_numpy(p.grad, tuple(p.shape)) for _, p in pairs]


def _sizes(steps: int) -> list[float]:
    """Calm, then a spike, then calm again: budgets with a history are in force by then."""
    return [1.0, 1.1, 0.9, 1.0, 50.0, 1.0, 30.0, 1.0][:steps]


def check_limits_hold_after_a_step(make: Make, plan: Plan, budget: Any, dtype: torch.dtype, strides: str) -> None:
    """After every step each node of the gradient is within the limit that the record names, and the record is true."""
    pairs = parameters(plan.layout, dtype)
    splitter = make(pairs, plan, budget)
    slack = 1 + 8 * torch.finfo(dtype).eps
    for step, size in enumerate(_sizes(6)):
        _set(pairs, tensors(plan.layout, dtype, strides, 10 * step, size=size))
        before = [None if p.grad is None else p.grad.clone() for _, p in pairs]
        record = splitter.step()
        after_N = node_norms(plan, np.sqrt(square_sums(plan, [p.grad for _, p in pairs])))
        limit_N = record.decision.limit_N.numpy()
        assert (after_N <= limit_N * slack + 1e-30).all(), f"step {step}: {after_N} above {limit_N}"
        np.testing.assert_allclose(record.norm_B.numpy(), np.sqrt(square_sums(plan, before)), rtol=1e-6)
        zero_B = np.zeros(plan.num_bins, dtype=bool)
        for t, old in enumerate(before):
            want = scaled_by_labels(
                plan, to_numpy(old, plan.layout.shapes[t]), t, record.decision.scale_B.numpy(), zero_B
            )
            tiny = torch.finfo(dtype).smallest_normal
            np.testing.assert_allclose(_now(pairs)[t], want, rtol=tolerance_of(dtype), atol=tiny)


def check_bad_values_stay_in_their_bin(
    make: Make,
    plan: Plan,
    budget: Any,
    dtype: torch.dtype,
    bad: float,
    target: int,
    options: dict[str, Any] | None = None,
) -> None:
    """A bin with one bad value is set to zero and named; everything else, now and later, is bit for bit what it would
    have been had the bin's gradient been zero."""
    labels, layout = label_elements(plan), plan.layout
    runs = []
    for value in (bad, 0.0):
        pairs = parameters(layout, dtype)
        splitter, seen = make(pairs, plan, budget, **(options or {})), []
        for step, size in enumerate(_sizes(6)):
            gradients = tensors(layout, dtype, "contiguous", 10 * step, size=size)
            if step in (0, 3):
                for canvas, gradient in zip(labels, gradients, strict=True):
                    mask = torch.from_numpy(np.asarray(canvas == target))
                    gradient[mask] = 0
                    if value != 0 and mask.any():
                        where = tuple(mask.nonzero()[0].tolist())
                        gradient[where] = value
            _set(pairs, gradients)
            record = splitter.step()
            if step in (0, 3) and value != 0:
                zeroed = (record.decision.outcome_B == gs_zeroed()).nonzero().flatten().tolist()
                assert zeroed == [target], f"zeroed bins {zeroed}, the bad value is in {target}"
                assert record.worst(1)[0].name == plan.bins[target].name, "the bad bin is not named"
                assert not math.isfinite(record.worst(1)[0].norm), "the record hides what was measured"
            seen.append(_now(pairs))
        runs.append(seen)
    for step, (bad_run, zero_run) in enumerate(zip(*runs, strict=True)):
        for name, a, b in zip(layout.names, bad_run, zero_run, strict=True):
            np.testing.assert_array_equal(a, b, f"step {step}, {name}: a bad value reached beyond its bin or its step")


def gs_zeroed() -> int:
    return int(gs.Outcome.ZEROED)


def check_saving_changes_nothing(
    make: Make, plan: Plan, budget: Any, dtype: torch.dtype, options: dict[str, Any] | None = None
) -> None:
    """Saved after three steps and loaded into a fresh splitter, every later step is the same bit for bit."""

    def run(*, save: bool) -> list[list[np.ndarray]]:
        pairs, seen = parameters(plan.layout, dtype), []
        splitter = make(pairs, plan, budget, **(options or {}))
        for step, size in enumerate(_sizes(8)):
            if save and step == 3:
                state = splitter.state_dict()
                splitter = make(pairs, plan, budget, **(options or {}))
                splitter.load_state_dict(state)
            splitter.optimizer.param_groups[0]["lr"] = 0.4 * 0.7**step  # a schedule whose top has passed by then
            _set(pairs, tensors(plan.layout, dtype, "contiguous", 10 * step, size=size))
            record = splitter.step()
            seen.append([*_now(pairs), np.array(record.step), record.decision.limit_N.numpy()])
        return seen

    for step, (a, b) in enumerate(zip(run(save=True), run(save=False), strict=True)):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y, f"step {step} differs after a round trip")


def check_generous_limits_keep_every_bit(make: Make, plan: Plan, dtype: torch.dtype, strides: str) -> None:
    """Within its limits a gradient is not touched, bit for bit, at any level."""
    levels = [level for level in ("root", "module", "tensor", "bin") if len(plan.level_nodes(level))]
    for level in levels:
        pairs = parameters(plan.layout, dtype)
        splitter = make(pairs, plan, {level: gs.Relative(1e30)})
        _set(pairs, tensors(plan.layout, dtype, strides, 5, size=3.0))
        before = [p.grad.clone() for _, p in pairs if p.grad is not None]
        record = splitter.step()
        assert (record.decision.scale_B == 1).all(), f"{level}: scaled within its limit"
        for old, (name, p) in zip(before, pairs, strict=True):
            assert p.grad is not None, "a gradient vanished"
            a, b = (x.to_dense() if x.is_sparse else x for x in (old, p.grad))
            assert torch.equal(a, b), f"{level}: {name} changed within its limit"
            parts = [torch.view_as_real(x) if x.is_complex() else x for x in (a, b)]
            assert torch.equal(*(torch.signbit(x) for x in parts)), f"{level}: {name}: the sign of a zero changed"


def check_order_of_tensors(make: Make, layout: Layout, strategy: Callable[[Layout], Plan], budget: Any) -> None:
    """Permuting the tensors permutes the outcome."""
    results = []
    for order in (range(len(layout)), reversed(range(len(layout)))):
        ids = list(order)
        permuted = Layout(tuple(layout.names[i] for i in ids), tuple(layout.shapes[i] for i in ids))
        all_pairs, by_name = parameters(layout), {}
        pairs = [all_pairs[i] for i in ids]
        splitter = make(pairs, strategy(permuted), budget)
        for step, size in enumerate(_sizes(6)):
            gradients = tensors(layout, torch.float64, "contiguous", 10 * step, size=size)
            _set(pairs, [gradients[i] for i in ids])
            splitter.step()
            by_name |= {(step, name): to_numpy(p.grad, tuple(p.shape)) for name, p in pairs}
        results.append(by_name)
    for key, value in results[0].items():
        np.testing.assert_allclose(results[1][key], value, rtol=1e-12, err_msg=f"{key}: the order of tensors matters")


def check_absent_gradients(make: Make, plan: Plan, budget: Any, absent: int) -> None:
    """A tensor without a gradient keeps None, and the others are what they are beside a gradient of zeros."""
    outcomes = []
    for is_none in (True, False):
        pairs = parameters(plan.layout)
        splitter = make(pairs, plan, budget)
        for step, size in enumerate(_sizes(6)):
            gradients: list[torch.Tensor | None] = list(
                tensors(plan.layout, torch.float64, "contiguous", 10 * step, size=size)
            )
            shape = plan.layout.shapes[absent]
            gradients[absent] = None if is_none else torch.zeros(shape, dtype=torch.float64)
            _set(pairs, gradients)
            splitter.step()
            assert (pairs[absent][1].grad is None) is is_none, "a gradient appeared or vanished"
        outcomes.append(_now(pairs))
    for a, b in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(a, b)


def check_units(make: Make, plan: Plan, c: float) -> None:
    """Gradients and limits c times as large give gradients c times as large."""
    results = []
    for factor in (1.0, c):
        pairs = parameters(plan.layout)
        levels = {level: gs.Fixed(factor * k) for k, level in ((1.0, "root"), (0.3, "bin"))}
        splitter = make(pairs, plan, levels)
        _set(pairs, [g * factor for g in tensors(plan.layout, torch.float64, "contiguous", 3)])
        splitter.step()
        results.append(_now(pairs))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(b, a * c, rtol=1e-12)
