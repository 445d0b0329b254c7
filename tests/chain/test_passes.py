"""ChainSplitter bounds what trains the model, and nothing else: not a gradient inside a loss, not a copy."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import gradsplit as gs
from tests.chain.nets import TwoHeads

TINY = gs.Fixed(1e-6)


def net_and_inputs() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    return net, torch.linspace(0, 1, 100)[:, None].requires_grad_()


def test_a_gradient_inside_a_loss_is_the_true_one() -> None:
    net, x = net_and_inputs()

    def slope() -> float:
        return torch.autograd.grad(net(x).sum(), x)[0].norm().item()

    true = slope()
    assert true == pytest.approx(2.3617, abs=1e-4)
    chain = gs.ChainSplitter(net, at="layers").attach()
    for _ in range(20):
        net(x).mean().backward()
    before = chain.rows()
    assert slope() == true
    assert chain.rows() == before, "a pass that trains nothing is no observation"
    chain.remove()


PASSES = {
    "to the inputs": (lambda net, x: torch.autograd.grad(net(x).sum(), x), False),
    "to the parameters": (lambda net, x: torch.autograd.grad(net(x).sum(), list(net.parameters())), False),
    "to an activation": (lambda net, x: torch.autograd.grad((h := net[1](net[0](x))).sum(), h), False),
    "backward to the inputs": (lambda net, x: net(x).sum().backward(inputs=[x]), False),
    "a function's gradient": (
        lambda net, x: grad(lambda p: functional_call(net, p, (x.detach(),)).sum())(dict(net.named_parameters())),
        False,
    ),
    "a jacobian": (
        lambda net, x: torch.autograd.functional.jacobian(lambda y: net(y).sum(), x.detach(), vectorize=True),
        False,
    ),
    "backward": (lambda net, x: net(x).sum().backward(), True),
    "backward to some parameters": (lambda net, x: net(x).sum().backward(inputs=[net[0].weight]), True),
    "backward, parts called alone": (lambda net, x: net[2](net[1](net[0](x))).sum().backward(), True),
    "backward in a reentrant checkpoint": (
        lambda net, x: checkpoint(net, x, use_reentrant=True).sum().backward(),
        True,
    ),
    "backward through given parameters": (
        lambda net, x: (
            functional_call(net, {k: p.detach().requires_grad_() for k, p in net.named_parameters()}, (x,))
            .sum()
            .backward()
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_only_passes_that_accumulate_into_parameters_are_bounded(name: str) -> None:
    run, bounded = PASSES[name]
    net, x = net_and_inputs()
    with gs.ChainSplitter(net, at="layers", budget=TINY) as chain:
        run(net, x)
    assert any(row.bounded for row in chain.rows()) == bounded


def test_a_frozen_part_hides_no_parameters_of_another() -> None:
    net, x = net_and_inputs()
    trained, frozen = nn.Linear(1, 1), net.requires_grad_(False)
    model = nn.ModuleDict({"frozen": frozen, "trained": trained})
    with gs.ChainSplitter(model, at=["frozen.0", "trained"], budget=TINY) as chain:
        (model["trained"](x) + 2 * model["frozen"](x)).sum().backward()
    assert {row.name: row.bounded for row in chain.rows()}["trained"] == 1


def test_a_gradient_penalty_is_bounded_in_the_outer_pass_only() -> None:
    net, x = net_and_inputs()
    with gs.ChainSplitter(net, at="layers", budget=TINY) as chain:
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        inner = slope.detach().clone()
        assert not chain.rows()
        ((slope.norm() - 1).square() + net(x).mean()).backward()
    assert chain.rows()
    assert torch.equal(inner, torch.autograd.grad(net(x).sum(), x)[0])


def test_a_task_fork_leaves_a_gradient_inside_a_loss_alone() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(6, 4, requires_grad=True)

    def slope() -> torch.Tensor:
        first, second = model(x)
        return torch.autograd.grad(first.sum() + 1e4 * second.sum(), x)[0]

    true = slope()
    chain = gs.ChainSplitter(model, at="forks").attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(3):
        first, second = model(x)
        (first.square().mean() + 1e4 * second.square().mean()).backward()
    assert any(row.bounded for row in chain.rows())
    assert torch.equal(slope(), true)
    chain.remove()


def unpickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


@pytest.mark.parametrize("at", ["auto", "layers"])
@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled, saved, averaged])
def test_a_copy_of_an_attached_model_is_free(copied, passes: int, at: str) -> None:
    net, x = net_and_inputs()
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    chain = gs.ChainSplitter(net, at=at, budget=TINY).attach()
    for _ in range(passes):
        net(x).sum().backward()
    twin, before = copied(net), chain.rows()
    twin.zero_grad()
    twin(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(twin.parameters(), expected, strict=True))
    assert chain.rows() == before
    net.zero_grad()
    net(x).sum().backward()
    bounded = {row.name: row.bounded for row in chain.rows()}
    assert bounded["2"] == passes + 1, "the model itself stays bounded"
    chain.remove()


def test_a_pickle_of_an_attached_model_names_nothing_of_this_package() -> None:
    net, x = net_and_inputs()
    with gs.ChainSplitter(net):
        net(x).sum().backward()
        assert b"gradsplit" not in pickle.dumps(net)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_copy_of_the_splitter_has_its_statistics_and_is_not_attached(copied) -> None:
    net, x = net_and_inputs()
    net.chain = gs.ChainSplitter(net, at="layers").attach()
    net(x).sum().backward()
    twin = copied(net)
    assert twin.chain.rows() == net.chain.rows() and twin.chain.model is twin
    twin.chain.attach()
    twin(x).sum().backward()
    assert [row.norm for row in twin.chain.rows()] == [row.norm for row in net.chain.rows()]
    net.chain.remove()


VMAPS = {
    "vmap of grad": lambda net, x: vmap(grad(lambda y: net(y).sum()))(x),
    "vmap": lambda net, x: vmap(net)(x),
    "vmap of grad to parameters": lambda net, x: vmap(
        grad(lambda p, y: functional_call(net, p, (y,)).sum()), in_dims=(None, 0)
    )({k: p.detach() for k, p in net.named_parameters()}, x),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap_is_refused_by_name(name: str) -> None:
    net, x = net_and_inputs()
    with (
        gs.ChainSplitter(net, at="layers"),
        pytest.raises(RuntimeError, match=r"outside of torch\.func\.vmap.*at '0'.*\.remove\(\)"),
    ):
        VMAPS[name](net, x.detach())
    VMAPS[name](net, x.detach())


def test_vmap_without_gradients_is_none_of_its_business() -> None:
    net, x = net_and_inputs()
    with gs.ChainSplitter(net, at="layers"), torch.no_grad():
        assert vmap(net)(x).shape == (100, 1)
