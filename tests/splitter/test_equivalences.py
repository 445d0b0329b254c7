"""What the splitter equals where somebody else has the same rule: a global clip, clips per tensor, AGC."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 2), nn.Flatten(0), nn.Linear(6, 7)).to(dtype)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) * 10.0 ** (i - 3)
    return model


def twins(dtype=torch.float64):
    """Two models of the same weights and gradients."""
    return model_of(dtype), model_of(dtype)


def assert_same_gradients(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("limit", [1e-2, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_bin_over_everything_is_a_global_clip(limit, dtype):
    """To 1e-6 relative, and torch's 1e-6 in the denominator."""
    ours, theirs = twins(dtype)
    record = gs.GradientSplitter(ours, "whole", gs.Fixed(limit)).step()
    total = nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    assert float(record.total_norm()) == pytest.approx(float(total), rel=1e-6)
    assert_same_gradients(ours, theirs, rtol=1e-6 + 1e-6 / limit, atol=0)


@pytest.mark.parametrize("limit", [1e-2, 1.0, 30.0])
def test_a_limit_at_the_root_of_rows_is_a_global_clip(limit):
    ours, theirs = twins()
    gs.GradientSplitter(ours, "xsp", {"root": gs.Fixed(limit)}).step()
    nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    assert_same_gradients(ours, theirs, rtol=1e-6 + 1e-6 / limit, atol=0)


@pytest.mark.parametrize("limit", [1e-2, 1.0, 30.0])
def test_bins_of_tensors_are_a_loop_of_clips(limit):
    ours, theirs = twins()
    gs.GradientSplitter(ours, "per_tensor", gs.Fixed(limit)).step()
    for p in theirs.parameters():
        nn.utils.clip_grad_norm_([p], limit)
    assert_same_gradients(ours, theirs, rtol=1e-6 + 1e-6 / limit, atol=0)


def adaptive_gradient_clipping(parameters, factor=0.01, eps=1e-3):
    """Brock et al. 2021 as timm writes it: a unit is an output row, and a vector or scalar as a whole."""
    for p in parameters:
        unit = tuple(range(1, p.ndim)) if p.ndim > 1 else None
        keep = p.ndim > 1
        weight = torch.linalg.vector_norm(p.detach(), dim=unit, keepdim=keep).clamp_min(eps)
        norm = torch.linalg.vector_norm(p.grad, dim=unit, keepdim=keep)
        largest = weight * factor
        bounded = p.grad * (largest / norm.clamp_min(1e-6))
        p.grad = torch.where(norm < largest, p.grad, bounded)


@pytest.mark.parametrize("factor", [0.01, 0.16, 10.0])
def test_rows_with_a_relative_limit_are_adaptive_gradient_clipping(factor):
    ours, theirs = twins()
    nn.init.zeros_(ours[0].bias)  # below eps
    nn.init.zeros_(theirs[0].bias)
    record = gs.GradientSplitter(ours, "xsp", gs.Relative(factor)).step()
    adaptive_gradient_clipping(theirs.parameters(), factor)
    assert_same_gradients(ours, theirs, rtol=1e-9, atol=0)
    outcomes = set(record.decision.outcome_B.tolist())
    assert {0, 1} >= outcomes
    assert 1 in outcomes


def test_relative_step_keeps_the_steps_of_sgd_within_a_share_of_each_row():
    """With momentum and a limit met at every step, each row moves at most 3 % of its length, or of 1."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    gs.GradientSplitter(model).attach(optimizer)
    largest = 0.0
    for _ in range(60):
        model.weight.grad, model.bias.grad = torch.full((5, 6), 1e3), torch.full((5,), -1e3)
        before = model.weight.detach().clone()
        optimizer.step()
        share = (model.weight.detach() - before).norm(dim=1) / before.norm(dim=1).clamp(min=1.0)
        largest = max(largest, float(share.max()))
    # The rows grow while the momentum's sum holds limits of earlier, shorter rows: never above the present one.
    assert 0.02 < largest <= 0.03 * 1.001


def test_relative_step_follows_the_schedule():
    """tau follows lr / largest lr; the limit on the gradient is tau (1 - momentum) w / lr."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    splitter = gs.GradientSplitter(model, budget=gs.RelativeStep(0.1), optimizer=optimizer)
    length = (2 * 9.0) ** 0.5
    for lr, top in ((0.5, 0.5), (0.05, 0.5), (0.25, 0.5), (1.0, 1.0), (0.5, 1.0)):
        optimizer.param_groups[0]["lr"] = lr
        model.weight.grad = torch.full((1, 2), 1e6)
        limit = float(splitter.step().decision.limit_B)
        assert limit == pytest.approx(0.1 * (lr / top) * length * (1 - 0.5) / lr, rel=1e-6)


def test_each_parameter_group_has_its_own_rate():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    for p in model.parameters():
        nn.init.ones_(p)
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[1].weight], "lr": 0.4, "momentum": 0.75}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    splitter = gs.GradientSplitter(model, budget=gs.RelativeStep(0.1), optimizer=optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)
    limit_B = splitter.step().decision.limit_B
    torch.testing.assert_close(limit_B, torch.tensor([0.1 * 2**0.5 / 0.1, 0.1 * 1.0 * 0.25 / 0.4], dtype=torch.float64))
