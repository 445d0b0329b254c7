"""Unrolled cells, gains a time step, the penalty that draws them to one, and Lyapunov exponents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradsplit.chain import Unrolled, gain_penalty, gradient_chain, lyapunov_exponents
from gradsplit.chain.recurrent import Cell, squared_norms
from tests.chain.nets import Recurrent

KINDS = [nn.RNN, nn.GRU, nn.LSTM]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
)
def test_unrolled_is_the_fused_module(kind: type[nn.RNNBase], options: dict[str, object]) -> None:
    torch.manual_seed(0)
    fused = kind(3, 4, **options).double()
    x = torch.randn(5, 6, 3).double()
    ours, theirs = Unrolled(fused)(x), fused(x)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out[0].square().sum(), list(fused.parameters())) for out in (ours, theirs)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", KINDS)
def test_initial_states_and_single_series(kind: type[nn.RNNBase]) -> None:
    fused = kind(3, 4).double()
    start = torch.randn(1, 2, 4).double()
    initial = (start, start + 1) if kind is nn.LSTM else start
    x = torch.randn(5, 2, 3).double()
    torch.testing.assert_close(Unrolled(fused)(x, initial), fused(x, initial))
    torch.testing.assert_close(Unrolled(fused)(x[:, 0]), fused(x[:, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_those_of_the_jacobians(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(1)
    cell = Cell(kind(3, 4).double())
    inputs, states = torch.randn(2, 3, 3).double(), torch.randn(2, 3, cell.state_size).double()
    signals = torch.randn_like(states)
    before, after = squared_norms(cell, inputs, states, signals)
    for t in range(2):
        for n in range(3):
            jacobian = torch.autograd.functional.jacobian(lambda h, t=t, n=n: cell(inputs[t, n], h), states[t, n])
            assert float(before[t, n]) == pytest.approx(float(signals[t, n].square().sum()))
            assert float(after[t, n]) == pytest.approx(float((jacobian.T @ signals[t, n]).square().sum()))


def test_the_penalty_and_its_gradient_follow_the_formula() -> None:
    torch.manual_seed(0)
    fused = nn.RNN(2, 5).double()
    unrolled = Unrolled(fused)
    x = torch.randn(6, 3, 2).double()
    with unrolled.keep_signals():
        output, _ = unrolled(x)
        output[-1].square().sum().backward()
    states = [s.detach() for s in unrolled.states[0]]
    signals = [s.grad for s in unrolled.states[0][1:]]
    weight = fused.weight_hh_l0.detach().clone().requires_grad_()
    terms = []
    for t in range(6):
        pulled = (signals[t] * (1 - states[t + 1] ** 2)) @ weight  # the slope is a constant, as in the authors' code
        terms.append((pulled.square().sum(1) / signals[t].square().sum(1) - 1).square())
    expected = torch.stack(terms).mean()
    fused.zero_grad()
    found = gain_penalty(unrolled)
    found.backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(fused.weight_hh_l0.grad, torch.autograd.grad(expected, weight)[0])
    assert fused.weight_ih_l0.grad is None and fused.bias_hh_l0.grad is None


def test_the_penalty_of_a_gated_cell_holds_gates_and_slopes_constant() -> None:
    torch.manual_seed(2)
    fused = nn.GRU(2, 3).double()
    x, h, d = torch.randn(4, 2, 2).double(), torch.randn(4, 2, 3).double(), torch.randn(4, 2, 3).double()
    with torch.no_grad():
        from_x = (x @ fused.weight_ih_l0.T + fused.bias_ih_l0).chunk(3, -1)
        from_h = (h @ fused.weight_hh_l0.T + fused.bias_hh_l0).chunk(3, -1)
        reset, update = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
        new = torch.tanh(from_x[2] + reset * from_h[2])
        at_new = (1 - update) * (1 - new**2) * d
        entering = [reset * (1 - reset) * from_h[2] * at_new, update * (1 - update) * (h - new) * d, reset * at_new]
    weight = fused.weight_hh_l0.detach().clone().requires_grad_()
    pulled = update * d + torch.cat(entering, -1) @ weight
    expected = (pulled.square().sum(-1) / d.square().sum(-1) - 1).square().mean()
    found = gain_penalty(Cell(fused), x, h, d)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, fused.weight_hh_l0)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, weight)[0])


def test_descending_the_penalty_draws_the_gain_to_one() -> None:
    torch.manual_seed(0)
    fused = nn.RNN(2, 8)
    with torch.no_grad():
        fused.weight_hh_l0.mul_(3)
    unrolled, x = Unrolled(fused), 0.1 * torch.randn(10, 4, 2)
    optimizer = torch.optim.SGD([fused.weight_hh_l0], lr=0.02)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        with unrolled.keep_signals():
            unrolled(x)[0][-1].sum().backward()
        optimizer.zero_grad()
        penalty = gain_penalty(unrolled)
        penalty.backward()
        optimizer.step()
        values.append(float(penalty.detach()))
    assert values[-1] < 0.3 * values[0]


def test_the_penalty_without_signals_is_explained() -> None:
    with pytest.raises(ValueError, match="keep_signals"):
        gain_penalty(Unrolled(nn.RNN(1, 1)))
    with pytest.raises(ValueError, match="beside a Cell"):
        gain_penalty(Cell(nn.RNN(1, 1)))
    with pytest.raises(ValueError, match="proj_size=1"):
        Cell(nn.LSTM(1, 2, proj_size=1))
    with pytest.raises(ValueError, match="dropout=0"):
        Unrolled(nn.LSTM(1, 2, num_layers=2, dropout=0.5))
    with pytest.raises(TypeError, match="pad_packed_sequence"):
        Unrolled(nn.LSTM(1, 2))(nn.utils.rnn.pack_sequence([torch.zeros(2, 1)]))


def test_exponents_of_a_linear_map_are_the_logarithms_of_its_eigenvalues() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)) @ basis.T
    states = [torch.zeros(5, dtype=torch.float64)] * 300
    found = lyapunov_exponents(lambda t, h: matrix @ h, states, num=3)
    assert found == pytest.approx([math.log(3), 0.0, math.log(0.5)], abs=1e-2)


def test_a_hot_recurrence_shows_in_gains_and_exponents() -> None:
    torch.manual_seed(0)
    model = Recurrent(nn.RNN, nonlinearity="relu")
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(2 * torch.eye(4))
        model.rnn.bias_ih_l0.fill_(1.0)
    chain = gradient_chain(model, lambda m, x: m(x).sum(), torch.rand(3, 9, 3))
    (steps,) = chain.recurrences
    assert len(steps.gain_T) == 9 and steps.gain_T[0] == pytest.approx(2.0, rel=1e-5)
    assert steps.cumulative == pytest.approx(9 * math.log10(2), rel=1e-3)
    assert steps.exponents[0] == pytest.approx(math.log(2), rel=1e-3)


class _Net(nn.Module):
    def __init__(self, way, **options):
        super().__init__()
        self.rnn, self.way = nn.GRU(4, 3, **options), way

    def forward(self, x):
        start = 0.5 * torch.ones(2 if self.rnn.bidirectional else 1, x.shape[1], 3, dtype=x.dtype)
        if self.way == "by position":
            return self.rnn(x, start)[0]
        return self.rnn(x, hx=start)[0] if self.way == "state by keyword" else self.rnn(input=x, hx=start)[0]


@pytest.mark.parametrize("way", ["state by keyword", "both by keyword"])
def test_arguments_by_keyword_are_the_ones_that_are_measured(way):
    x, found = torch.randn(5, 2, 4), []
    for each in ("by position", way):
        torch.manual_seed(1)
        found.append(gradient_chain(_Net(each), lambda m, x: m(x).square().sum(), x).recurrences[0])
    assert found[0].gain_T == found[1].gain_T
    assert found[0].exponents == found[1].exponents


def test_a_product_counts_the_steps_that_a_signal_enters():
    """The loss reads the last output, and the backward direction makes it in its first step."""
    model = _Net("by position", bidirectional=True)
    chain = gradient_chain(model, lambda m, x: m(x)[-1].square().sum(), torch.randn(5, 2, 4))
    back = chain.recurrences[1]
    assert [math.isnan(gain) for gain in back.gain_T] == [True] * 4 + [False]
    assert back.cumulative == pytest.approx(math.log10(back.gain_T[-1]))


def test_a_recurrence_in_bfloat16_has_the_chain_of_its_float32_twin():
    torch.manual_seed(2)
    model, x = _Net("by position"), torch.randn(5, 2, 4)
    whole = gradient_chain(model, lambda m, x: m(x).square().sum(), x).recurrences[0]
    half = gradient_chain(model.bfloat16(), lambda m, x: m(x).square().sum(), x.bfloat16()).recurrences[0]
    np.testing.assert_allclose(half.gain_T, whole.gain_T, rtol=0.05)
    np.testing.assert_allclose(half.exponents, whole.exponents, atol=0.05)


def test_a_frozen_recurrence_has_a_chain_too():
    """The signal passes it on its way to what is below."""
    model = nn.Sequential(nn.Linear(4, 4), _Net("by position"))
    whole = gradient_chain(model, lambda m, x: m(x).square().sum(), torch.ones(5, 2, 4)).recurrences[0]
    model[1].requires_grad_(False)
    frozen = gradient_chain(model, lambda m, x: m(x).square().sum(), torch.ones(5, 2, 4)).recurrences[0]
    assert frozen.gain_T == whole.gain_T
