"""At a kink the series follows the side that the step goes to: coefficients of t -> f(x + t d) for small t > 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gradsplit.ladder import UnsupportedOperation
from gradsplit.ladder.rules import branches
from gradsplit.ladder.trace import trace_loss


def _coefficients(function, x, *directions, order=3):
    """One column per direction, all followed together, as bins are."""
    point = {"x": torch.tensor(x, dtype=torch.float64)}
    moves = {"x": torch.tensor(directions, dtype=torch.float64)}
    return trace_loss(lambda p: function(p["x"]).sum(), point).series(point, moves, order).T.tolist()


def test_relu_at_zero_follows_each_bin_to_its_own_side():
    assert _coefficients(F.relu, [0.0], [1.0], [-1.0], [0.0]) == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_kink_reached_at_second_order_is_seen():
    """x = t^2: zero at order 0 and 1, positive for every small step."""
    assert _coefficients(lambda x: F.relu(x * x), [0.0], [2.0]) == [[0, 0, 4, 0]]
    assert _coefficients(lambda x: F.relu(-x * x), [0.0], [2.0]) == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("function", "up", "down"),
    [
        (torch.abs, [0, 1, 0, 0], [0, 1, 0, 0]),
        (F.leaky_relu, [0, 1, 0, 0], [0, -0.01, 0, 0]),
        (lambda x: x.clamp(0, 1), [0, 1, 0, 0], [0, 0, 0, 0]),
        (lambda x: x.clamp(-1, 0), [0, 0, 0, 0], [0, -1, 0, 0]),
        (lambda x: torch.maximum(x, 2 * x), [0, 2, 0, 0], [0, -1, 0, 0]),
        (lambda x: torch.minimum(x, 2 * x), [0, 1, 0, 0], [0, -2, 0, 0]),
        (lambda x: torch.where(x >= 0, x, x * x), [0, 1, 0, 0], [0, 0, 1, 0]),
        (lambda x: (x > 0).double() * 3, [3, 0, 0, 0], [0, 0, 0, 0]),
        (torch.sign, [1, 0, 0, 0], [-1, 0, 0, 0]),
    ],
)
def test_both_sides_of_a_kink(function, up, down):
    np.testing.assert_allclose(_coefficients(function, [0.0], [1.0], [-1.0]), [up, down])


def test_tied_maxima_are_told_apart_by_the_next_order():
    assert _coefficients(lambda x: x.amax(), [1.0, 1.0], [2.0, 3.0], [3.0, 2.0], [0.0, -1.0]) == [
        [1, 3, 0, 0],
        [1, 3, 0, 0],
        [1, 0, 0, 0],
    ]
    assert _coefficients(lambda x: x.min(0)[0], [1.0, 1.0], [2.0, 3.0], [0.0, -1.0]) == [[1, 2, 0, 0], [1, -1, 0, 0]]


def test_equal_series_compare_as_equal():
    assert _coefficients(lambda x: (x == x).double() * x, [1.0], [2.0]) == [[1, 2, 0, 0]]


def test_minus_infinity_in_a_mask_is_no_kink():
    """Causal attention: masked scores are -inf at every step, and weigh nothing."""

    def masked(x):
        scores = x.masked_fill(torch.tensor([False, True, False]), -torch.inf)
        return F.softmax(scores, 0) * torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)

    def short(x):
        return F.softmax(x[[0, 2]], 0) * torch.tensor([1.0, 2.0], dtype=torch.float64)

    found = _coefficients(masked, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    np.testing.assert_allclose(found, _coefficients(short, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]), rtol=1e-13)


def test_the_branch_not_taken_may_be_infinite():
    assert _coefficients(lambda x: torch.where(x > 0, x, 1 / (x * 0)), [1.0], [2.0]) == [[1, 2, 0, 0]]


def test_pooling_takes_the_first_of_equal_values_as_the_forward_pass_does():
    image = [[[[1.0, 1.0], [0.0, 0.0]]]]
    move = [[[[2.0, 3.0], [9.0, 9.0]]]]
    assert _coefficients(lambda x: F.max_pool2d(x, 2), image, move) == [[1, 2, 0, 0]]


def test_a_comparison_that_looks_at_order_0_only_is_caught(monkeypatch):
    right = branches.sign_for_small_steps
    monkeypatch.setattr(branches, "sign_for_small_steps", lambda a, b: right(a, b) * 0)
    with pytest.raises(AssertionError):
        test_relu_at_zero_follows_each_bin_to_its_own_side()


JUMPS = {
    "sign of a matrix product": lambda x: ((x - 0.5).sign() @ x[:3].exp()).sum(),
    "sign in a convolution": lambda x: F.conv1d((x - 0.5).sign().reshape(1, 1, 12), x[:1].exp().reshape(1, 1, 3)).sum(),
    "mask in a matrix product": lambda x: (torch.where(x > 0.5, 1.0, 2.0) @ x[:3].exp()).sum(),
    "mask as an index": lambda x: x.exp()[(x[:, 0] > 0.5).long()].sum(),
    "mask to gather": lambda x: x.exp().gather(1, (x[:, :1] > 0.5).long()).sum(),
    "index of the largest": lambda x: (x.exp() * torch.arange(3)).gather(1, x.max(1, keepdim=True)[1]).sum(),
    "index of the smallest": lambda x: (x.exp() * torch.arange(3)).gather(1, x.min(1)[1][:, None]).sum(),
    "class": lambda x: (((x > 0.5).long() == 1) * x.exp()).sum(),
    "one hot": lambda x: (F.one_hot((x[:3, 0] > 0.5).long(), 3) * x[:3].exp()).sum(),
    "sum of a mask": lambda x: ((x > 0.5) + x.exp()).sum(),
    "mask of masks": lambda x: (((x > 0.5) * (x < 0.6)) * x.exp()).sum(),
    "number in a mask": lambda x: (x.exp() * (x > 0.5)).sum() / ((x > 0.5).sum() + 1),
    "sort of a jump": lambda x: (((x - 0.5).sign() + torch.arange(3) / 10).sort(1)[0] * x.exp()).sum(),
    "topk of a jump": lambda x: (((x - 0.5).sign() + torch.arange(3) / 10).topk(2, 1)[0] * x[:, :2].exp()).sum(),
    "pool of a jump": lambda x: (F.max_pool2d((x - 0.5).sign().reshape(1, 1, 4, 3), 2) * x[0, 0]).sum(),
}


@pytest.mark.parametrize("name", JUMPS)
def test_at_a_jump_each_bin_goes_its_own_way(name):
    """Bins that stand at the same jump and leave it on different sides give what each of them gives alone."""
    x = torch.full((4, 3), 0.5)
    x[0, 1], x[2, 2] = 0.7, 0.3
    moves = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0]))[:, :, None] * torch.randn(4, 3).abs()
    alone = [_coefficients(JUMPS[name], x.tolist(), move.tolist())[0] for move in moves]
    assert any(abs(a[0] - b[0]) > 1e-3 for a, b in zip(alone[1:], alone[:-1], strict=True)), "no bin jumps"
    np.testing.assert_allclose(_coefficients(JUMPS[name], x.tolist(), *moves.tolist()), alone, rtol=1e-12, atol=1e-12)


def test_a_mask_that_picks_another_number_of_entries_per_bin_is_refused():
    with pytest.raises(UnsupportedOperation, match=r"a mask x\[mask\] that picks other numbers for one bin"):
        _coefficients(lambda x: x[x > 0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0])
