"""A sample beyond the limit is bounded in the layer's own weight gradient, and its signal goes on unchanged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradsplit.sources import RULES, RunningLimit, SampleSplitter
from tests.sources.cases import CASES, grads, made
from tests.sources.oracle import alone, bounded_sum, limits

RULE = RunningLimit(quantile=0.5, factor=1.5)
# Layers whose normalised row has the same length for every sample count the signal alone.
_NORMS = {name for name in CASES if "norm" in name}


def _norms(name, x, signal):
    d = signal.flatten(1).norm(dim=1)
    if name in ("lstm, deep", "gru"):  # the last state is an output of its own, and goes to every place
        d = torch.hypot(d, signal.sum(1).norm(dim=1))
    if name in _NORMS:
        return d.tolist()
    a = x
    if name == "conv2d, circular":
        a = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    a = a.flatten(1).norm(dim=1)
    if name.startswith("attention"):
        # self-attention has one input, attention between two has a second of twice the length
        a = a * math.sqrt(5 if "cross" in name else 1)
    return (a * d).tolist()


@pytest.mark.parametrize("name", [name for name in CASES if name != "deep"])
def test_the_sum_is_the_one_of_the_formula(name):
    model, x = made(name)
    signal = torch.randn_like(model(x))
    signal[3] *= 50
    signal[5] *= 8
    parts, norms = alone(model, x, signal), _norms(name, x, signal)
    (limit,) = limits([norms], 0.5, 1.5, 0.1, 0.1, 1.25)
    expected = bounded_sum(parts, norms, limit)
    x.requires_grad_()
    (model(x) * signal).sum().backward()
    signal_below, x.grad = x.grad, None
    model.zero_grad()
    with SampleSplitter(model, RULE) as splitter:
        (model(x) * signal).sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(
            grad, expected[key], rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    torch.testing.assert_close(x.grad, signal_below)
    beyond = {i: n / limit for i, n in enumerate(norms) if n > limit}
    assert {row.sample: pytest.approx(row.ratio, rel=1e-5) for row in splitter.named()} == beyond
    assert {3, 5} <= set(beyond)


def test_an_embedding_is_bounded_by_the_signal():
    model = nn.Embedding(9, 4).double()
    ids = torch.tensor([[1, 2], [3, 3], [1, 5], [7, 8], [4, 4]])
    signal = torch.randn(5, 2, 4).double()
    signal[1] *= 100
    norms = signal.flatten(1).norm(dim=1).tolist()
    (limit,) = limits([norms], 0.5, 1.5, 0.1, 0.1, 1.25)
    expected = bounded_sum(alone(model, ids, signal), norms, limit)
    with SampleSplitter(model, RULE):
        (model(ids) * signal).sum().backward()
    torch.testing.assert_close(model.weight.grad, expected["weight"])


@pytest.mark.parametrize("kind", [*RULES, RunningLimit(quantile=0.8, factor=1.0, up=0.5, down=0.3, growth=1.1)])
@pytest.mark.parametrize("way", ["numbers", "tensors"])
def test_limits_follow_the_formula_over_many_batches(kind, way):
    generator = torch.Generator().manual_seed(1)
    rule = RULES.get(kind, kind) if isinstance(kind, str) else kind
    batches = [(torch.randn(9, generator=generator).exp() * 3 ** (t % 5)).double() for t in range(12)]
    batches[4][2], batches[5][:] = math.nan, math.nan
    batches[6][1:] = 0
    scale, found = torch.zeros((), dtype=torch.float64), []
    for norm_S in batches:
        counts_S = norm_S.isfinite() & (norm_S > 0)
        if way == "numbers":
            scale, limit, largest = rule.follow_numbers(float(scale), norm_S.numpy())
            assert largest == pytest.approx(float(norm_S.max()), nan_ok=True)
        else:
            scale, limit = rule.follow(scale, norm_S, counts_S)
        found.append(float(limit))
    expected = limits([b.tolist() for b in batches], rule.quantile, rule.factor, rule.up, rule.down, rule.growth)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_the_batch_may_lie_elsewhere_and_tokens_may_be_samples(batch_dim, per):
    model = nn.Linear(3, 2, bias=False).double()
    x, signal = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 2).double()
    signal[2, 1] *= 40
    lead = (0, 1) if per == "token" else (batch_dim,)
    rest = [dim for dim in (0, 1, 2) if dim not in lead]
    norm = torch.linalg.vector_norm(x, dim=rest, keepdim=True) * torch.linalg.vector_norm(
        signal, dim=rest, keepdim=True
    )
    (limit,) = limits([norm.flatten().tolist()], 0.5, 1.5, 0.1, 0.1, 1.25)
    expected = torch.einsum("bto,bti->oi", signal * (limit / norm).clamp(max=1), x)
    with SampleSplitter(model, RULE, batch_dim=batch_dim, per=per) as splitter:
        (model(x) * signal).sum().backward()
    torch.testing.assert_close(model.weight.grad, expected)
    place = {("sample", 0): 2, ("sample", 1): 1, ("token", 0): 11, ("token", 1): 11}[per, batch_dim]
    assert place in {row.sample for row in splitter.named()}


def test_scaling_the_loss_scales_the_gradient():
    model, x = made("deep")
    found = []
    for factor in (1.0, 1e3):
        with SampleSplitter(model, RULE, leave_out=["position"]):
            (model(x).square() * torch.linspace(0, 9, 7).view(-1, 1, 1) * factor).sum().backward()
        found.append(grads(model))
    for key, grad in found[0].items():
        torch.testing.assert_close(grad * 1e3, found[1][key])


def test_permuting_the_samples_permutes_the_decisions():
    model, x = made("conv2d")
    signal = torch.randn_like(model(x))
    signal[3] *= 50
    order = torch.tensor([4, 3, 0, 6, 5, 1, 2])
    with SampleSplitter(model, RULE) as first:
        (model(x) * signal).sum().backward()
    expected = grads(model)
    with SampleSplitter(model, RULE) as second:
        (model(x[order]) * signal[order]).sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])
    moved = {int((order == row.sample).nonzero()): pytest.approx(row.ratio) for row in first.named()}
    assert {row.sample: row.ratio for row in second.named()} == moved


@pytest.mark.parametrize(
    "constant", [{"quantile": 0}, {"quantile": 1.1}, {"factor": 0}, {"up": 0}, {"down": -1}, {"growth": 1}]
)
def test_a_constant_out_of_range_is_refused(constant):
    (name,) = constant
    with pytest.raises(ValueError, match=rf"RunningLimit\({name}="):
        RunningLimit(**constant)
