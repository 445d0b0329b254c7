from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gradsplit.chain import balance_, gradient_chain


def stack(depth: int = 30, gain: float = 2.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(24, 24), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=gain * (2 / 24) ** 0.5)
    return nn.Sequential(*layers, nn.Linear(24, 3))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_every_layer_gets_outputs_of_one_size_and_the_record_says_how() -> None:
    model, x = stack(), torch.randn(64, 24)
    entries = balance_(model, loss, x)
    assert len(entries) == 31 and entries[-1].before > 1e6
    assert all(entry.after == pytest.approx(1.0, rel=1e-4) for entry in entries)
    chain = gradient_chain(model, loss, torch.randn(64, 24))
    assert all(0.8 < chain.link(str(2 * k)).activation < 1.25 for k in range(30))
    # one width, so the backward gain is near one as well: 30 layers of gain 2 were nine decades
    assert abs(chain.link("0").cumulative) < 1.0


def test_a_share_near_one_keeps_inputs_apart_and_units_on() -> None:
    model, x = stack(60), torch.randn(64, 24)
    balance_(model, loss, x, on=0.95, orthogonal=True)
    with torch.no_grad():
        out = model[:-1](x)
    assert float((model[0](x) > 0).double().mean()) == pytest.approx(0.95, abs=0.03)
    centred = out - out.mean(0)
    assert float(centred.square().mean() / out.var()) > 0.5  # without the share, all inputs become one direction
    assert abs(gradient_chain(model, loss, x).link("0").cumulative) < 1.5


def test_convolutions_and_what_is_not_weighted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
    norm = model[1].weight.clone()
    entries = balance_(model, loss, torch.randn(8, 2, 9, 9), orthogonal=True)
    assert [entry.name for entry in entries] == ["0", "2"] and torch.equal(norm, model[1].weight)
    middle = model[2].weight[:, :, 1, 1] / entries[1].factor
    torch.testing.assert_close(middle @ middle.T, torch.eye(4), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_is_explained() -> None:
    model, x = stack(2), torch.randn(4, 24)
    with pytest.raises(ValueError, match="target=0"):
        balance_(model, loss, x, target=0)
    with pytest.raises(ValueError, match=r"on=0\.3"):
        balance_(model, loss, x, on=0.3)
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    with pytest.raises(ValueError, match="finite size above 0 at '0'"):
        balance_(model, loss, x)
    assert not any(module._forward_hooks for module in model.modules())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _doubled(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def _doubled_bias(layer):
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


COMPUTED = {
    "WeightNorm": nn.utils.parametrizations.weight_norm,
    "SpectralNorm": nn.utils.parametrizations.spectral_norm,
    "Orthogonal": nn.utils.parametrizations.orthogonal,
    "SpectralNorm, by a hook": nn.utils.spectral_norm,
    "L1Unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "Doubled": _doubled,
    "Doubled bias": _doubled_bias,
}


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_are_refused_by_name_and_nothing_is_changed(kind, orthogonal):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), COMPUTED[kind](nn.Linear(4, 4)), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part, rule = ("bias", "Doubled") if "bias" in kind else ("weight", kind.partition(",")[0])
    with pytest.raises(ValueError, match=rf"{part} of 2 is computed from other tensors \({rule}\)\. Call balance_"):
        balance_(model, lambda m, b: m(b).sum(), x, orthogonal=orthogonal)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_older_weight_norm_is_refused_too():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match=r"weight of \(root\) is computed from other tensors \(WeightNorm\)"):
        balance_(layer, lambda m, b: m(b).sum(), torch.ones(1, 2, 3))


@pytest.mark.parametrize(
    "layer, said",
    [
        (lambda: nn.LazyLinear(2), "weight of 0 is lazy, so run the model once"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight of 0 is on the meta device"),
    ],
)
def test_weights_without_values_are_refused_by_name(layer, said):
    with pytest.raises(ValueError, match=said):
        balance_(nn.Sequential(layer()), lambda m, b: m(b).sum(), torch.ones(1, 2))
