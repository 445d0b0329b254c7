"""What every budget must do. A budget yields limits from norms and history, node by node, in any namespace."""

from __future__ import annotations

import numpy as np
import torch

from gradsplit.budget import Budget, Reading
from gradsplit.budget.lines import line_table
from gradsplit.xp import numpy_xp, torch_xp

History = list[np.ndarray]
"""One vector of norms a step, 0 where a bin had no gradient or one that was not finite."""


def replay(budget: Budget, history: History, *, weight: float = 1.0, pace: float = 1.0) -> tuple[History, tuple]:
    """Limits before every step, and the last state, when each norm is let through up to its limit."""
    num = len(history[0])
    state, limits = budget.init(numpy_xp, np.zeros(num)), []
    for norm in history:
        reading = Reading(norm, np.full(num, weight), np.full(num, 4.0), np.full(num, 2.0), np.full(num, pace))
        limit = budget.limits(numpy_xp, reading, state)
        limits.append(limit)
        state = budget.learn(numpy_xp, reading, np.minimum(norm, limit), state)
    return limits, state


def check_limits_are_limits(budget: Budget, history: History) -> None:
    """Limits are >= 0 or inf, one a node, and never NaN, whatever finite norms came before."""
    limits, state = replay(budget, history)
    for limit in limits:
        assert limit.shape == history[0].shape, "not one limit a node"
        assert (limit >= 0).all(), f"negative or NaN limits: {limit}"
    for array in state:
        assert np.isfinite(array).all(), f"a history that is not finite: {array}"


def check_nodes_are_apart(budget: Budget, history: History) -> None:
    """A node's limit does not depend on another node's norms."""
    alone, _ = replay(budget, history)
    spoilt, _ = replay(budget, [np.where(np.arange(len(n)) == 0, n, n[::-1] * 1e6 + 1.0) for n in history])
    for a, b in zip(alone, spoilt, strict=True):
        assert a[0] == b[0], f"limit {a[0]} became {b[0]} when the other nodes changed"


def check_absence_teaches_nothing(budget: Budget, history: History) -> None:
    """A step without an observation (no gradient, or none that was finite) leaves limits and history as they were."""
    zero = np.zeros_like(history[0])
    limits, state = replay(budget, history)
    _, later = replay(budget, [*history, zero, zero])
    for a, b in zip(state, later, strict=True):
        np.testing.assert_array_equal(a, b, "an absent gradient changed the history")
    again, _ = replay(budget, [*history, zero, zero, history[-1]])
    direct, _ = replay(budget, [*history, history[-1]])
    np.testing.assert_array_equal(again[-1], direct[-1], "an absent gradient changed the next limit")
    assert len(limits) == len(history), "a limit is missing"


def check_spike_has_no_weight_beyond_its_limit(budget: Budget, history: History) -> None:
    """History takes in what was let through: of a spike a million times as large it learns no more than of one ten
    times as large, once limits are in force."""
    limits, _ = replay(budget, [*history, history[-1]])
    bounded = np.isfinite(limits[-1]) & (limits[-1] > 0)
    size = np.where(bounded, limits[-1], 1.0)
    _, after_small = replay(budget, [*history, size * 10])
    _, after_large = replay(budget, [*history, size * 1e6])
    for a, b in zip(after_small, after_large, strict=True):
        # ZScore draws the larger spike nearer to the mean, so it may learn less; no budget may learn more.
        assert (b[bounded] <= a[bounded] * (1 + 1e-9)).all(), f"a larger spike left a larger history: {a} and {b}"


def check_a_spike_at_first_is_forgotten(budget: Budget, history: History) -> None:
    """A thousandfold spike at any one of the first 30 observations of a calm run, or at none: at step 40 the limits on
    an explosion are within a factor of two of each other. The calm run rises or falls by a factor of ten."""
    places = 30
    for drift in (0.1, 1.0, 10.0):
        calm = [1.0 + float(norm[0] / (1.0 + norm[0])) for norm in history] * 40
        norms = [calm[t] * drift ** (t / 39) for t in range(40)]
        # One node per place of the spike, and one without; no node looks at another.
        spiked = [np.where(np.arange(places + 1) == t, 1000 * norm, norm) for t, norm in enumerate(norms)]
        limits, _ = replay(budget, [*spiked, np.full(places + 1, 1000 * norms[-1])])
        assert np.isfinite(limits[-1]).all(), "an explosion at step 40 is not bounded"
        ratio = limits[-1] / limits[-1][-1]
        assert (ratio > 0.5).all(), f"limits on {ratio.min()} of the clean run's, spike at {ratio.argmin()}"
        assert (ratio < 2.0).all(), f"limits on {ratio.max()} of the clean run's, spike at {ratio.argmax()}"


def check_units(budget: Budget, history: History, rescaled: Budget) -> None:
    """Norms, weights and the budget's own limits in other units give limits in those units.

    Args:
        rescaled: the same budget where its constants with units are four times as large.
    """
    plain, _ = replay(budget, history)
    larger, _ = replay(rescaled, [norm * 4.0 for norm in history], weight=4.0)
    for a, b in zip(plain, larger, strict=True):
        np.testing.assert_allclose(b, a * 4.0, rtol=1e-12)


def check_namespaces_agree(budget: Budget, history: History) -> None:
    """numpy and torch give the same limits."""
    want, _ = replay(budget, history)
    num = len(history[0])
    state = budget.init(torch_xp, torch.zeros(num, dtype=torch.float64))
    ones = torch.ones(num, dtype=torch.float64)
    for norm, limit in zip(history, want, strict=True):
        reading = Reading(torch.from_numpy(norm), ones, 4.0 * ones, 2.0 * ones, ones)
        got = budget.limits(torch_xp, reading, state)
        np.testing.assert_allclose(got.numpy(), limit, rtol=1e-12)
        state = budget.learn(torch_xp, reading, torch.minimum(reading.norm, got), state)


def check_its_descriptions_are_true(budget: Budget, history: History) -> None:
    """Where a budget describes its limits by a line or a constant, they are that, whatever the history."""
    num = len(history[0])
    drawn = np.random.default_rng(num)
    state = budget.init(numpy_xp, np.zeros(num))
    for norm in history:
        weight, rows = drawn.exponential(size=num) * drawn.choice([0.0, 1e-4, 1.0, 1e3], num), drawn.integers(1, 9, num)
        width = drawn.integers(1, 99, num).astype(float)
        pace = drawn.random(num)
        reading = Reading(norm, weight, rows * width, rows.astype(float), pace)
        limit = budget.limits(numpy_xp, reading, state)
        if budget.constant() is not None:
            np.testing.assert_array_equal(limit, np.broadcast_to(budget.constant(), num), "it varies")
        if budget.line() is not None:
            # One tensor per node, so that the table has the widths and paces of the nodes.
            ((slope, floor, root),) = line_table([budget.line()], width, pace)
            want = np.maximum(slope * weight, floor + root * np.sqrt(rows * width))
            np.testing.assert_allclose(limit, want, rtol=1e-12, err_msg="the line is not the limit")
            assert budget.line().bounds_update is budget.bounds_update, "a line in the units of something else"
        state = budget.learn(numpy_xp, reading, np.minimum(norm, limit), state)


ALL = (
    check_limits_are_limits,
    check_nodes_are_apart,
    check_absence_teaches_nothing,
    check_spike_has_no_weight_beyond_its_limit,
    check_namespaces_agree,
    check_its_descriptions_are_true,
)
