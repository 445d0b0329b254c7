"""Whole networks: orders 1 to 5 against nested autograd, orders to 30 of a small one against mpmath."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradsplit.ladder import loss_of_model, recurrences, taylor_ladder
from gradsplit.ladder.trace import trace_loss
from tests.ladder.oracles import mpmath_taylor, nested_autograd, random_direction, relative_errors


class PlainLayerNorm(nn.Module):
    """Layer norm from its formula: torch's own has a wrong third derivative (see the last test)."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight + self.bias


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Block(nn.Module):
    """A pre-norm transformer block on embedded tokens, causal, with its output layer."""

    def __init__(self, layer_norm=PlainLayerNorm, width=8, heads=2, tokens=6):
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(tokens, width)
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 16), nn.Linear(16, width), nn.Linear(width, tokens)

    def forward(self, tokens):
        x = self.embed(tokens)
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x).flatten(0, 1)


def _tanh_mlp():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, lambda m, batch: F.mse_loss(m(batch), torch.ones(5, 3)), torch.randn(5, 4)


def _lstm():
    return Recurrent(nn.LSTM), lambda m, batch: m(batch).square().mean(), torch.randn(2, 5, 3)


def _gru():
    return Recurrent(nn.GRU), lambda m, batch: m(batch).square().mean(), torch.randn(2, 5, 3)


def _convolutions():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return model, lambda m, batch: F.cross_entropy(m(batch), torch.tensor([0, 2])), torch.randn(2, 1, 6, 6)


def _transformer():
    tokens = torch.randint(6, (2, 4))
    return Block(), lambda m, batch: F.cross_entropy(m(batch), batch.flatten()), tokens


NETWORKS = {"tanh MLP": _tanh_mlp, "LSTM": _lstm, "GRU": _gru, "conv": _convolutions, "transformer": _transformer}


def _problem(name):
    model, loss_fn, batch = NETWORKS[name]()
    model = model.double()
    batch = batch.double() if batch.is_floating_point() else batch
    return loss_of_model(model, loss_fn, batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_orders_1_to_5_equal_nested_autograd(name):
    torch.manual_seed(1)
    loss_of_params, params = _problem(name)
    if name == "tanh MLP":  # the constant of its loss is float32 otherwise, which rounds autograd's side
        model, _, batch = _tanh_mlp()
        loss_of_params, params = loss_of_model(model.double(), lambda m, b: (m(b) - 1).square().mean(), batch.double())
    direction = random_direction(params)
    ladder = taylor_ladder(loss_of_params, params, direction, order=5)
    found = ladder.coefficient.to_float()[:, 0]
    np.testing.assert_allclose(found, nested_autograd(loss_of_params, params, direction, 5), rtol=1e-9)


def test_a_model_in_float32_gets_the_same_ladder():
    """Its parameters and its batch are raised to float64; the parameters' values are float32 numbers."""
    model, loss_fn, batch = _lstm()
    single = taylor_ladder(*loss_of_model(model, loss_fn, batch), order=6).coefficient
    double = taylor_ladder(*loss_of_model(model.double(), loss_fn, batch.double()), order=6).coefficient
    np.testing.assert_allclose(single.log, double.log, rtol=1e-12)


def _mlp_for_mpmath():
    torch.manual_seed(3)
    sizes = (2, 4, 4, 1)
    weights = {f"w{i}": torch.randn(m, n, dtype=torch.float64) for i, (n, m) in enumerate(itertools.pairwise(sizes))}
    moves = {name: torch.randn_like(w) / 2 for name, w in weights.items()}
    inputs = torch.randn(3, 2, dtype=torch.float64)

    def loss_of_params(p):
        hidden = torch.tanh(torch.tanh(inputs @ p["w0"].T) @ p["w1"].T)
        return (hidden @ p["w2"].T).square().mean()

    def exact(t):
        moved = {
            name: [
                [mpmath.mpf(a) + t * mpmath.mpf(b) for a, b in zip(*rows, strict=True)]
                for rows in zip(weights[name].tolist(), moves[name].tolist(), strict=True)
            ]
            for name in weights
        }
        total = mpmath.mpf(0)
        for x in inputs.tolist():
            x = [mpmath.mpf(v) for v in x]
            for name in ("w0", "w1"):
                x = [mpmath.tanh(mpmath.fdot(row, x)) for row in moved[name]]
            total += mpmath.fdot(moved["w2"][0], x) ** 2
        return total / 3

    return loss_of_params, weights, moves, exact


def test_orders_to_30_of_an_mlp_equal_mpmath():
    loss_of_params, weights, moves, exact = _mlp_for_mpmath()
    ladder = taylor_ladder(loss_of_params, weights, moves, order=30)
    reference = mpmath_taylor(exact, 0, 30, circle=0.6 * ladder.radius_B[0], digits=40, points=128)
    error = relative_errors(ladder.coefficient[:, 0], reference)
    assert np.median(error) < 1e-12
    assert error.max() < 1e-9


def test_a_wrong_order_in_the_tanh_recurrence_is_caught(monkeypatch):
    right = recurrences._push_square

    def fault(out, m, y, value):
        right(out, m, y, value if m != 4 else 2 * value)

    monkeypatch.setattr(recurrences, "_push_square", fault)
    with pytest.raises(AssertionError):
        test_orders_to_30_of_an_mlp_equal_mpmath()


def test_order_99_of_a_transformer_block_reaches_its_true_loss():
    """At half the radius the series and the network agree to 1e-9: all orders and the radius at once."""
    loss_of_params, params = _problem("transformer")
    direction = random_direction(params)
    ladder = taylor_ladder(loss_of_params, params, direction, order=99)
    step = 0.5 * ladder.radius_B[0]
    true = loss_of_params({name: p + step * direction[name] for name, p in params.items()})
    assert ladder.predict(step)[0] == pytest.approx(true.item(), rel=1e-9)


def test_layer_norm_is_right_where_nested_autograd_is_not():
    """torch's double backward of layer_norm takes the saved mean and deviation for constants (pytorch#175754)."""
    x, d = torch.randn(2, 4, 3, dtype=torch.float64)
    norm = PlainLayerNorm(3).double()

    def fused(p):
        return (F.layer_norm(p["x"], (3,)) ** 3).sum()

    def formula(p):
        return (norm(p["x"]) ** 3).sum()

    expected = nested_autograd(formula, {"x": x}, {"x": d}, 5)
    for loss in (fused, formula):
        found = trace_loss(loss, {"x": x}).series({"x": x}, {"x": d[None]}, 5)[:, 0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_batch_norm_in_training_moves_its_statistics():
    x, w = torch.randn(5, 3, dtype=torch.float64), {"w": torch.randn(3, 3, dtype=torch.float64)}
    d = random_direction(w)

    def formula(p):
        y = x @ p["w"]
        y = y - y.mean(0)
        return (y * (y.square().mean(0) + 1e-5).rsqrt()).pow(3).sum()

    def fused(p):
        return F.batch_norm(x @ p["w"], torch.zeros(3), torch.ones(3), training=True).pow(3).sum()

    found = trace_loss(fused, w).series(w, {"w": d["w"][None]}, 5)[:, 0].numpy()
    np.testing.assert_allclose(found, nested_autograd(formula, w, d, 5), rtol=1e-9)


def test_group_norm_and_its_affine_part_move():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    p = {"scale": torch.rand(4, dtype=torch.float64), "shift": torch.randn(4, dtype=torch.float64), "x": x}
    d = random_direction(p)

    def formula(q):
        y = q["x"].reshape(2, 2, 6)
        y = y - y.mean(-1, keepdim=True)
        y = (y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).reshape(2, 4, 3)
        return (y * q["scale"][:, None] + q["shift"][:, None]).pow(3).sum()

    def fused(q):
        return F.group_norm(q["x"], 2, q["scale"], q["shift"]).pow(3).sum()

    found = trace_loss(fused, p).series(p, {n: v[None] for n, v in d.items()}, 5)[:, 0].numpy()
    np.testing.assert_allclose(found, nested_autograd(formula, p, d, 5), rtol=1e-9)


def test_what_python_reads_of_a_value_is_frozen_as_it_was():
    def loss(p):
        mask = torch.arange(3).cumsum(0)
        scale = 2.0 if bool((mask == 0).all()) else 3.0  # of constants, as masks of attention are chosen
        return (p["x"] if float(p["x"].detach().sum()) > 0 else 7 * p["x"]).exp().sum() * scale

    ladder = taylor_ladder(loss, {"x": torch.tensor([0.5])}, {"x": torch.tensor([-1.0])}, order=3)
    np.testing.assert_allclose(ladder.derivative.to_float()[:, 0], 3 * np.exp(0.5) * np.array([1, -1, 1, -1]))


def test_dropout_is_one_fixed_draw():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    problem = loss_of_model(model, lambda m, x: m(x).square().mean(), torch.randn(8, 4))
    state = torch.random.get_rng_state()
    first, second = (taylor_ladder(*problem, order=4).coefficient.log for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_running_statistics_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh())
    before = {name: b.clone() for name, b in model.named_buffers()}
    taylor_ladder(*loss_of_model(model, lambda m, x: m(x).square().mean(), torch.randn(8, 4)), order=3)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
