"""Every kind of finding: planted, it names the guilty module; sound nets have none that explodes."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsplit.diagnose
from gradsplit.diagnose import activations, diagnose, samples, signals, steps, weights
from gradsplit.diagnose.diagnosis import EXPLODING, KINDS
from gradsplit.diagnose.evidence import weight_heats
from gradsplit.diagnose.signals import loss_weights
from gradsplit.diagnose.steps import _bound_of_momentum, sharpness
from tests.chain.nets import NAMES, Recurrent, TwoHeads, build


class Operation(nn.Module):
    def __init__(self, change: object) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def stack(depth: int = 6, width: int = 16, between: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), between()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def top(model: nn.Module, batch: Tensor, loss_fn: object = square, optimizer: object = None) -> tuple[str, str]:
    finding = diagnose(model, loss_fn, batch, optimizer).findings[0]
    return finding.kind, finding.name


X = torch.linspace(-1, 1, 128).reshape(8, 16)


@pytest.mark.parametrize("factor", [10, 1000])
@pytest.mark.parametrize("layer", [0, 4, 12])
def test_a_hot_layer_is_named_with_the_factor_that_mends_it(layer: int, factor: float) -> None:
    model = stack()
    before = model[layer].weight.detach().clone()
    with torch.no_grad():
        model[layer].weight.mul_(factor)
    finding = diagnose(model, square, X).findings[0]
    assert (finding.kind, finding.name) == ("hot layer", str(layer))
    mend = float(finding.change.split(" by ")[1].split(",")[0])
    assert float((model[layer].weight.detach() * mend).norm() / before.norm()) == pytest.approx(1.0, rel=0.5)


def test_weights_of_one_sign_are_hot() -> None:
    model = stack()
    with torch.no_grad():
        model[4].weight.uniform_(0, 1)
    assert top(model, X) == ("hot layer", "4")


def test_an_even_explosion_has_first_and_last_layer_and_gain_per_link() -> None:
    model = stack(24, between=nn.Identity)
    with torch.no_grad():
        for layer in list(model)[:-1:2]:
            layer.weight.normal_(std=1.5 / 4)
            layer.bias.zero_()
    found = {finding.kind: finding for finding in diagnose(model, square, X).findings}
    assert found["forward explosion"].severity > found["explosion"].severity
    assert "1.5 per link" in found["explosion"].sentence or "1.4" in found["explosion"].sentence
    assert found["explosion"].sentence.endswith("links") and "to 0," in found["explosion"].sentence


def test_vanishing() -> None:
    model = stack(24)
    with torch.no_grad():
        for layer in list(model)[:-1:2]:
            layer.weight.normal_(std=0.4 / 4)
    assert top(model, X) == ("vanishing", "0")


def test_a_head_that_drowns_the_trunk_and_the_weight_that_mends_it() -> None:
    model = TwoHeads()
    batch = torch.randn(6, 4)

    def loss(model: nn.Module, batch: Tensor, weight: float = 500.0) -> Tensor:
        cls, box = model(batch)
        return cls.square().mean() + weight * box.square().mean()

    result = diagnose(model, loss, batch)
    assert (result.findings[0].kind, result.findings[0].name) == ("head share", "box")
    weights = loss_weights(result.forks[0].norms)
    mended = diagnose(model, lambda m, b: loss(m, b, 500.0 * weights["box"]), batch).forks[0].norms
    assert mended["box"] == pytest.approx(mended["cls"], rel=1e-4)
    assert "loss weights that would equalise" in result.text()


BREAKS = {
    "forward, log": lambda x: x + (x - x.detach()).abs().log(),
    "forward, 0/0": lambda x: x + (x - x) / (x - x),
    "backward, sqrt": lambda x: x + (x - x.detach()).abs().sqrt(),
}


@pytest.mark.parametrize("label", BREAKS)
def test_the_first_producer_of_a_nan_is_named(label: str) -> None:
    model = stack()
    model[5] = Operation(BREAKS[label])
    finding = diagnose(model, square, X).findings[0]
    assert (finding.kind, finding.name) == ("nonfinite", "5")
    if "sqrt" in label:
        assert "SqrtBackward" in finding.evidence


def test_other_sources_of_nan() -> None:
    assert top(stack(), X * float("nan")) == ("nonfinite", "(input)")
    assert top(stack(), X, lambda m, b: m(b).sum() / (m(b).sum() * 0)) == ("nonfinite", "(loss)")
    model = stack()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    assert top(model, X) == ("nonfinite", "2")


def test_dead_and_saturated_layers() -> None:
    model = stack(between=nn.ReLU)
    with torch.no_grad():
        model[4].bias.fill_(-50)
    assert top(model, X) == ("dead units", "5")
    model = stack()
    with torch.no_grad():
        model[4].bias.fill_(8)
    assert ("saturation", "5") in [(f.kind, f.name) for f in diagnose(model, square, X).findings]


def test_a_missing_normalisation_in_a_sequence_and_in_blocks() -> None:
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()]
    layers[7] = nn.Identity()
    assert top(nn.Sequential(*layers, nn.Linear(16, 2)), X) == ("missing normalisation", "7")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lin = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.lin(self.norm(x))

    blocks = nn.ModuleList(Block() for _ in range(4))
    blocks[2].norm = nn.Identity()
    assert top(nn.Sequential(*blocks), X) == ("missing normalisation", "2.norm")


def test_a_recurrence_that_explodes_through_time() -> None:
    model = Recurrent(nn.RNN, nonlinearity="relu")
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(1.5 * torch.eye(4))
        model.rnn.bias_ih_l0.fill_(0.5)
    found = [f for f in diagnose(model, square, torch.rand(3, 40, 3)).findings if f.kind == "explosion through time"]
    assert found[0].name == "rnn" and found[0].value == pytest.approx(1.5**40, rel=0.5)


def test_a_module_that_no_signal_reaches() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(16, 16), nn.Linear(16, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).detach())

    found = {f.name: f.sentence for f in diagnose(Detached(), square, X).findings if f.kind == "no signal"}
    assert found == {"a": "a: no signal reaches it", "unused": "unused: it is never called"}


def test_a_rate_beyond_stability() -> None:
    model = nn.Linear(4, 1, bias=False)
    x = torch.randn(32, 4)
    value = 2 * float(torch.linalg.eigvalsh(x.T @ x / 32)[-1])
    assert sharpness(model, square, x, iterations=200) == pytest.approx(value, rel=1e-3)
    for momentum in (0.0, 0.9):
        stable = 2 * (1 + momentum) / value
        fast = torch.optim.SGD(model.parameters(), lr=1.1 * stable, momentum=momentum)
        slow = torch.optim.SGD(model.parameters(), lr=0.9 * stable, momentum=momentum)
        assert top(model, x, optimizer=fast) == ("unstable rate", "(optimizer)")
        assert not [f for f in diagnose(model, square, x, slow).findings if f.kind == "unstable rate"]
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    square(model, x).backward()
    adam.step()
    assert not [f for f in diagnose(model, square, x, adam).findings if f.kind == "unstable rate"]
    adam.param_groups[0]["lr"] = 1e3
    assert top(model, x, optimizer=adam)[0] == "unstable rate"


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.5}, {"dampening": 0.5}, {"momentum": 0.9}],
)
def test_the_bound_of_momentum_is_where_a_parabola_ceases_to_settle(options: dict[str, Any]) -> None:
    """Loss w^2 / 2 has sharpness 1; the rates are 1 % to both sides of the bound, and the steps decide."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    bound = _bound_of_momentum(torch.optim.SGD([weight], lr=1.0, **options).param_groups[0])
    ends = []
    for rate in (0.99 * bound, 1.01 * bound):
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=rate, **options)
        for _ in range(2000):
            w.grad = w.detach().clone()
            optimizer.step()
        ends.append(w.detach().abs().item())
    assert ends[0] < 1 < ends[1]


@pytest.mark.parametrize("name", ["RMSprop", "Muon"])
def test_an_optimizer_with_a_momentum_that_is_not_sgd_is_not_judged_as_sgd(name: str) -> None:
    model = nn.Linear(4, 4, bias=False)
    make = getattr(torch.optim, name, None)
    if make is None:
        pytest.skip(f"this torch has no {name}")
    optimizer = make(model.parameters(), lr=0.5)
    found = diagnose(model, square, 30 * torch.ones(3, 4), optimizer).findings
    assert not [f for f in found if f.kind == "unstable rate"]


def test_the_sharpness_is_the_largest_eigenvalue_and_not_the_one_of_largest_size() -> None:
    """Loss w_0^2 - 3 w_1^2 has the eigenvalues 2 and -6, and -3 w^2 has -6 alone."""
    model = nn.Linear(2, 1, bias=False)
    saddle = sharpness(model, lambda m, x: m.weight[0, 0] ** 2 - 3 * m.weight[0, 1] ** 2, None)
    assert saddle == pytest.approx(2.0, rel=1e-3)
    assert sharpness(model, lambda m, x: -3 * m.weight.square().sum(), None) == pytest.approx(-6.0)


def test_a_net_without_second_derivatives_is_diagnosed_without_its_sharpness() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.EmbeddingBag(20, 8), nn.Linear(8, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.table(tokens))

    model = Bag()
    result = diagnose(model, square, torch.arange(12).reshape(3, 4), torch.optim.SGD(model.parameters(), lr=0.1))
    assert result.notes == (
        "the sharpness was not measured: the derivative for '_embedding_bag_backward' is not implemented.",
    )


@pytest.mark.parametrize("name", NAMES)
def test_sound_nets_have_no_finding_of_explosion_and_are_left_as_they_were(name: str) -> None:
    model, loss_fn, batch = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    result = diagnose(model, loss_fn, batch)
    assert not [f for f in result.findings if f.kind in EXPLODING]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    json.dumps(result.to_dict(), allow_nan=False)


def test_running_statistics_and_gradients_survive() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    square(model, X).backward()
    grads, mean = [p.grad for p in model.parameters()], model[1].running_mean.clone()
    diagnose(model, square, X)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(model[1].running_mean, mean)


def test_an_optimizer_that_steps_inside_the_backward_pass_does_not_step() -> None:
    model = stack(2)
    called = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: called.append(p))
    diagnose(model, square, X)
    assert not called


def test_tied_tables_are_judged_as_maps() -> None:
    model, _, _ = build("tied")
    (first, *_) = weight_heats(model)
    assert first.module == "table" and first.enlarges == pytest.approx(
        float(model.out.weight.detach().square().mean().sqrt()) * 2
    )


def test_the_package_is_the_function() -> None:
    model = stack(2)
    assert gradsplit.diagnose(model, square, X).loss == diagnose(model, square, X).loss


def test_every_kind_of_finding_has_one_row_under_its_own_name() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    sources = [
        Path(module.__file__).read_text(encoding="utf8") for module in (activations, samples, signals, steps, weights)
    ]
    written = {name for source in sources for name in _kinds_written_in(source)}
    assert written == set(names)  # a finding of a kind without a row could not say whether it is an explosion


def _kinds_written_in(source: str) -> set[str]:
    """The first argument of every call that makes a finding."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    makers = [node.args[0] for node in calls if getattr(node.func, "id", "") in ("Finding", "_unlike")]
    return {first.value for first in makers if isinstance(first, ast.Constant)}


def test_the_kinds_that_explode_are_those_of_growth() -> None:
    assert {"hot layer", "forward explosion", "explosion", "explosion through time"} == EXPLODING
    grow = [kind for kind in KINDS if "explosion" in kind.name]
    assert len(grow) == 3 and all(kind.explodes for kind in grow)


def test_a_layer_that_is_hotter_than_its_siblings_but_enlarges_nothing_is_only_uneven() -> None:
    model = stack()
    with torch.no_grad():
        for layer in list(model)[::2]:
            layer.weight.mul_(0.01)
        model[4].weight.mul_(10)
    found = [f for f in diagnose(model, square, X).findings if "layer" in f.kind]
    assert [(f.kind, f.name) for f in found] == [("uneven layer", "4")]
