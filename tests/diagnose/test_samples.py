"""diagnose names the sample, or the loss term, that is not finite or carries most of the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import gradsplit as gs


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x)[:, 0] - y).square().mean()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 6, generator=generator), torch.randn(12, generator=generator)


def _found(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list:
    return [finding for finding in gs.diagnose(model, _loss, batch).findings if finding.kind == "one sample"]


def test_a_healthy_batch_has_no_finding():
    assert _found(_net(), _batch()) == []


def test_the_sample_that_carries_the_gradient_is_named():
    x, y = _batch()
    y[7] = 500.0
    (finding,) = _found(_net(), (x, y))
    assert finding.name == "sample 7"
    assert finding.value > 0.9
    assert "3 of 3 layers" in finding.evidence


def test_samples_that_are_not_finite_are_named():
    x, y = _batch()
    y[7], y[2] = math.nan, math.inf
    (finding,) = _found(_net(), (x, y))
    assert finding.name == "samples 2, 7"
    assert finding.severity < 100, "what is not finite in the net itself comes first"


def test_a_batch_that_is_bad_as_a_whole_is_no_matter_of_samples():
    x, y = _batch()
    assert _found(_net(), (x * math.nan, y)) == []


def test_a_model_that_cannot_be_split_is_noted_and_the_rest_is_found():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_sequence([x[0], x[1][:2]])
            return self.head(self.lstm(packed)[0].data)

    torch.manual_seed(0)
    found = gs.diagnose(Packed(), lambda m, x: m(x).square().mean(), torch.randn(2, 3, 2))
    assert any("samples were not examined" in note and "PackedSequence" in note for note in found.notes)


def test_the_model_is_left_as_it_was():
    model = _net()
    gs.diagnose(model, _loss, _batch())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def _terms(weight: float):
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"data": _loss(model, batch), "penalty": weight * model[0].weight.square().sum()}

    return loss


def _loud(weight: float) -> list:
    return [f for f in gs.diagnose(_net(), _terms(weight), _batch()).findings if f.kind == "loud term"]


def test_terms_of_one_size_have_no_finding():
    assert _loud(0.1) == []


def test_the_term_that_drowns_the_others_is_named_with_its_weight():
    model, batch = _net(), _batch()
    norms = {}
    for name, term in _terms(1e4)(model, batch).items():
        grads = torch.autograd.grad(term, list(model.parameters()), allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))
    (finding,) = _loud(1e4)
    assert finding.name == "penalty"
    assert math.isclose(finding.value, norms["penalty"] / norms["data"], rel_tol=1e-6)
    assert f"weigh it with {norms['data'] / norms['penalty']:.2g}" in finding.change


def test_a_term_that_is_not_finite_is_named():
    (finding,) = _loud(math.inf)
    assert finding.name == "penalty"
    assert "is not finite, the others are" in finding.sentence


def test_a_loss_by_terms_is_judged_as_their_sum():
    found = gs.diagnose(_net(), _terms(0.1), _batch())
    model, batch = _net(), _batch()
    total = gs.diagnose(model, lambda m, b: sum(_terms(0.1)(m, b).values()), batch)
    assert found.loss == total.loss
    assert [f.kind for f in found.findings] == [f.kind for f in total.findings]
