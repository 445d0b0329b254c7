"""GSO and an attached splitter under every scheduler of torch; averaging, freezing, tying, parametrisations."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import gradsplit as gs

STEPS = 8


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def backward(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    loss = (model(x) - 3).square().mean()
    loss.backward()
    return loss


MAKERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=3), schedulers.CosineAnnealingLR(o, 5)], [3]
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
PEAK = {"CyclicLR": 0.1, "OneCycleLR": 0.2}
"""The largest rate, where it is not the one that the optimizer was made with."""


def test_every_scheduler_of_torch_is_in_the_table():
    listed = {
        name for name in schedulers.__all__ if inspect.isclass(getattr(schedulers, name)) and name != "LRScheduler"
    }
    assert listed | {"SWALR"} == set(MAKERS)


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
def test_no_row_of_gso_moves_by_more_than_tau_times_the_pace_of_the_schedule(name, rate):
    """The limit is .03 x rate now / largest rate, whether the rate is a number or a tensor, and it is met."""
    model = model_of()
    optimizer = gs.GSO(model, lr=rate if isinstance(rate, float) else rate.clone(), weight_decay=0.0, direction="adam")
    scheduler, top, met = MAKERS[name](optimizer), 0.05, 0
    top = max(top, PEAK.get(name, 0.0)) if name == "OneCycleLR" else top
    rows = [model[0].weight, model[2].weight]
    if name == "CyclicLR":  # it begins at its lowest rate, and no group says how high it goes
        top = 0.0
    for step in range(STEPS):
        now = float(optimizer.param_groups[0]["lr"])
        top = max(top, now)
        before = [p.detach().clone() for p in rows]
        optimizer.zero_grad()
        loss = backward(model, step)
        optimizer.step()
        scheduler.step(*([float(loss.detach())] if name == "ReduceLROnPlateau" else []))
        for old, p in zip(before, rows, strict=True):
            share = (p.detach() - old).norm(dim=1) / old.norm(dim=1)
            limit = 0.03 * now / top
            assert (share <= limit * (1 + 1e-6) + 1e-15).all(), (step, share, limit)
            met += int((share > limit * 0.999).sum())
    assert met, "no cap bound, so nothing was seen"


@pytest.mark.parametrize("name", MAKERS)
def test_an_attached_splitter_bounds_what_sgd_moves_under_every_scheduler(name):
    """Without momentum a step is lr times the gradient, so that no row moves by more than its share either."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    gs.GradientSplitter(model, budget=gs.RelativeStep(0.03)).attach(optimizer)
    scheduler = (
        schedulers.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=False)
        if name == "CyclicLR"
        else schedulers.OneCycleLR(optimizer, 0.2, total_steps=STEPS + 1, cycle_momentum=False)
        if name == "OneCycleLR"
        else MAKERS[name](optimizer)
    )
    for step in range(STEPS):
        before = model[2].weight.detach().clone()
        optimizer.zero_grad()
        loss = backward(model, step)
        optimizer.step()
        scheduler.step(*([float(loss.detach())] if name == "ReduceLROnPlateau" else []))
        share = (model[2].weight.detach() - before).norm(dim=1) / before.norm(dim=1)
        assert (share <= 0.03 * (1 + 1e-6)).all(), (step, share)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["SWA", "EMA"])
def test_an_average_of_models_follows_gso(average):
    model = model_of()
    optimizer = gs.GSO(model, lr=0.05, direction="adam")
    averaged = AveragedModel(model, multi_avg_fn=average)
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        averaged.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    # The first update copies; from then on the mean, or half of the way.
    want = sum(seen) / 3 if average is None else (seen[0] / 4 + seen[1] / 4 + seen[2] / 2)
    torch.testing.assert_close(averaged.module[0].weight.detach(), want)


def test_a_frozen_parameter_rests_with_its_moments_and_goes_on_when_it_thaws():
    model = model_of()
    optimizer = gs.GSO(model, lr=0.05, budget=(gs.Ema(1.1, warmup=1), gs.RelativeStep()), direction="adam")
    weight = model[0].weight

    def train(steps):
        for step in steps:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()

    train(range(2))
    weight.requires_grad_(False)
    kept, moments = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    history = optimizer.state_dict()["gradsplit"][0]["gradient"]["bin/ema/0"][0][:6].clone()
    train(range(2, 5))
    assert torch.equal(weight, kept)
    assert all(torch.equal(value, moments[key]) for key, value in optimizer.state[weight].items())
    assert torch.equal(history, optimizer.state_dict()["gradsplit"][0]["gradient"]["bin/ema/0"][0][:6])
    weight.requires_grad_(True)
    train([5])
    assert not torch.equal(weight, kept)
    assert (optimizer.state[weight]["step"], optimizer.state[model[2].weight]["step"]) == (3, 6)


@pytest.mark.parametrize("direction", ["auto", "adam"])
def test_a_layer_that_is_thawed_later_is_updated_from_then_on(direction):
    model = model_of()
    model[0].requires_grad_(False)
    optimizer = gs.GSO(model, lr=0.03, direction=direction)
    before = model[0].weight.detach().clone()
    backward(model, 0)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    moved = (model[0].weight.detach() - before).norm() / before.norm()
    assert 0 < float(moved) <= 0.031


def test_groups_may_repeat_each_others_names():
    """As for torch's own optimizers, two modules may each bring a "weight"."""
    model = model_of()
    optimizer = gs.GSO([{"params": m.named_parameters()} for m in (model[0], model[2])], lr=0.05, direction="adam")
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_tied_weight_is_one_tensor_with_one_set_of_moments():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    optimizer = gs.GSO(model, lr=0.1, weight_decay=0.0, direction="adam")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    before = model["embed"].weight.detach().clone()
    model["head"](model["embed"](torch.arange(7))).square().sum().backward()
    optimizer.step()
    share = (model["head"].weight.detach() - before).norm(dim=1) / before.norm(dim=1)
    assert math.isclose(float(share.max()), 0.03, rel_tol=1e-4)
    assert model["head"].weight is model["embed"].weight


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_what_is_bounded_of_a_parametrised_weight_is_what_the_optimizer_holds(kind):
    torch.manual_seed(0)
    model = nn.Sequential(getattr(parametrizations, kind)(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = gs.GSO(model, lr=0.05, weight_decay=0.0, direction="adam")
    names = optimizer.param_groups[0]["param_names"]
    assert any(name.startswith("0.parametrizations.weight.original") for name in names)
    first = backward(model, 0).detach()
    for step in range(30):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        backward(model, 0)
        optimizer.step()
        for old, p in zip(before, model.parameters(), strict=True):
            if p.dim() > 1:
                floor = 0.01 * math.sqrt(p[0].numel())
                assert ((p.detach() - old).norm(dim=1) <= 0.03 * old.norm(dim=1).clamp(min=floor) * 1.000001).all(), (
                    step
                )
    assert backward(model, 0).detach() < first


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_have_no_gradient_and_are_left_out():
    """Their weights are no parameters; what is trained beside them is split as ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model[0] = torch.ao.nn.quantized.dynamic.Linear.from_float(_with_config(model[0]))
    optimizer = gs.GSO(model, lr=0.05, direction="adam")
    assert optimizer.param_groups[0]["param_names"] == ["1.weight", "1.bias"]
    model(torch.randn(5, 4)).square().sum().backward()
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[1].weight)
    assert gs.layout_of(model).names == ("1.weight", "1.bias")


def _with_config(layer):
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return layer


def test_a_sparse_layer_is_named_by_gso_and_split_in_front_of_sparse_adam():
    embedding = nn.Embedding(6, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), 0.1)
    splitter = gs.GradientSplitter(embedding, budget=gs.Fixed(1e-3))
    splitter.attach(optimizer)
    embedding(torch.tensor([1, 4, 4])).sum().backward()
    optimizer.step()
    norms = embedding.weight.grad.to_dense().norm(dim=1)
    torch.testing.assert_close(norms[[1, 4]], torch.full((2,), 1e-3))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("stored", [[0], [1], [0, 2]])
def test_the_sparse_gradient_of_a_vector_is_bounded_as_one_bin(stored, backend):
    p = nn.Parameter(torch.zeros(4))
    splitter = gs.GradientSplitter([("p", p)], budget=gs.Fixed(1.0), backend=backend)
    dense = torch.zeros(4)
    dense[stored] = 30.0
    p.grad = dense.to_sparse()
    splitter.step()
    torch.testing.assert_close(p.grad.to_dense().norm(), torch.tensor(1.0))
    assert p.grad.coalesce().indices().tolist() == [stored]
