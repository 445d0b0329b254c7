"""SampleSplitter in half precision, on empty batches, and where tokens are counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradsplit.sources import RunningLimit, SampleSplitter
from tests.sources.cases import grads

LOOSE = RunningLimit(factor=1e12)


class RunningQuantile:
    """A rule from outside of the package."""

    def follow(self, scale, norm_S, counts_S):
        return RunningLimit().follow(scale, norm_S, counts_S)


@pytest.mark.parametrize("options", [{"scaler": torch.amp.GradScaler("cpu")}, {"kind": RunningQuantile()}])
def test_an_empty_batch_is_left_alone_by_every_rule(options):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with SampleSplitter(model, **options) as splitter:
        model(torch.zeros(0, 3)).sum().backward()
        assert splitter.state_dict()["layers"] == {}
    assert not model[0].weight.grad.any()
    rule, norms = RunningLimit(), torch.zeros(0)
    assert [number.item() for number in rule.follow(torch.tensor(2.0), norms, norms > 0)] == [2.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rmsnorm_has_torch_s_gradient(dtype):
    """Rows so short that the eps of the norm counts, whose default is that of float32."""
    torch.manual_seed(0)
    model, x, c = nn.RMSNorm(8).to(dtype), (torch.randn(5, 8) * 1e-3).to(dtype), torch.randn(5, 8).to(dtype)
    (model(x) * c).sum().backward()
    expected = grads(model)["weight"]
    with SampleSplitter(model, LOOSE):
        (model(x) * c).sum().backward()
    torch.testing.assert_close(model.weight.grad, expected)


def test_a_recurrent_net_in_half_precision_passes_a_finite_signal_on():
    """The factor is below what float16 holds, and so is one over it."""
    torch.manual_seed(0)
    model = nn.LSTM(4, 4, batch_first=True)
    x, weight = torch.randn(6, 3, 4), torch.full((6, 3, 4), 1e-3)
    weight[2] = 2e4
    found = []
    for dtype in (torch.float32, torch.float16):
        model, inputs = model.to(dtype), x.detach().to(dtype).requires_grad_()
        with SampleSplitter(model, "regression"):
            model(inputs)[0].backward(weight.to(dtype))
        found.append(inputs.grad.float())
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=2e-5)


def test_the_tokens_of_a_sample_that_is_left_out_do_not_count():
    torch.manual_seed(0)
    tokens, signal = torch.tensor([[0, 1], [0, 0], [2, 1]]), torch.randn(3, 2, 3)
    for padding in (None, 1):
        model = nn.Embedding(4, 3, padding_idx=padding, scale_grad_by_freq=True)
        (model(tokens[[0, 2]]) * signal[[0, 2]]).sum().backward()
        expected = grads(model)["weight"]
        bad = torch.tensor([1.0, math.nan, 1.0]).view(3, 1, 1)
        with SampleSplitter(model, LOOSE):
            (model(tokens) * signal * bad).sum().backward()
        torch.testing.assert_close(model.weight.grad, expected)
