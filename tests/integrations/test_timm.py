"""timm's NFNet, ResNet and ViT, and its own clip, where timm can be imported: `make test-timm` makes such a place."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import gradsplit as gs
from gradsplit.plan import STRATEGIES
from tests.laws.oracles import square_sums

try:
    import timm
except (ModuleNotFoundError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
    pytest.skip(f"timm cannot be imported here ({error}); run make test-timm", allow_module_level=True)

from timm.models import model_parameters
from timm.utils import dispatch_clip_grad

SMALL = {
    "nfnet_f0": {"depths": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "group_size": 8, "num_features": 32},
    "resnet18": {"channels": (8, 8, 16, 16), "stem_width": 8},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2},
}
EVERY = pytest.mark.parametrize("name", SMALL)
EACH = pytest.mark.parametrize("strategy", STRATEGIES)


def model_of(name):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=5, **SMALL[name]).eval()


def backward(model):
    model.zero_grad()
    pixels = torch.linspace(-2.0, 2.0, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
    torch.nn.functional.cross_entropy(model(pixels), torch.tensor([1, 2])).backward()


def plan_of(name, strategy):
    model = model_of(name)
    splitter = gs.GradientSplitter(model, strategy, gs.Fixed(1.0))
    if STRATEGIES[strategy].needs_energy:
        splitter.calibrate(lambda: backward(model), steps=2)
    return splitter.plan


def kept_in_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@EVERY
@EACH
def test_each_bin_is_within_its_limit_after_a_step(name, strategy):
    model, plan = model_of(name), plan_of(name, strategy)
    backward(model)
    norms = np.sqrt(square_sums(plan, [p.grad for p in model.parameters()]))
    limit = float(np.median(norms)) if plan.num_bins > 1 else float(norms[0]) / 2
    gs.GradientSplitter(model, plan, gs.Fixed(limit)).step()
    after = np.sqrt(square_sums(plan, [p.grad for p in model.parameters()]))
    assert (after <= limit * (1 + 1e-5)).all()
    np.testing.assert_allclose(after[norms < limit * (1 - 1e-5)], norms[norms < limit * (1 - 1e-5)], rtol=0)


@EVERY
@EACH
def test_no_bin_moves_by_more_than_its_share_in_a_step_of_gso_that_goes_on_from_a_file(name, strategy):
    plan = plan_of(name, strategy)

    def begun():
        model = model_of(name)
        return model, gs.GSO(model, lr=0.1, plan=plan, weight_decay=0.0, direction="adam")

    (whole, optimizer), (resumed, other) = begun(), begun()
    start = [p.detach().clone() for p in whole.parameters()]
    backward(whole)
    optimizer.step()
    moved = np.sqrt(square_sums(plan, [p - s for p, s in zip(whole.parameters(), start, strict=True)]))
    allowed = 0.03 * np.maximum(np.sqrt(square_sums(plan, start)), 0.01 * np.sqrt(plan.numel_B))
    assert (moved <= allowed * (1 + 1e-4)).all()
    assert moved.max() > 0
    resumed.load_state_dict(kept_in_a_file(whole.state_dict()))
    other.load_state_dict(kept_in_a_file(optimizer.state_dict()))
    for model, step in ((whole, optimizer), (resumed, other)):
        backward(model)
        step.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@EVERY
@pytest.mark.parametrize("exclude_head", [False, True])
def test_rows_with_a_relative_limit_are_timms_agc(name, exclude_head):
    ours, theirs = model_of(name).double(), model_of(name).double()
    for model in (ours, theirs):
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    named = list(ours.named_parameters())
    gs.GradientSplitter(named[:-2] if exclude_head else named, "xsp", gs.Relative(0.01)).step()
    dispatch_clip_grad(model_parameters(theirs, exclude_head=exclude_head), 0.01, mode="agc")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=0)
