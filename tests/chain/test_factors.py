from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from torch import nn

from gradsplit.chain import gradient_chain
from gradsplit.chain.factors import apply_factors, factored_forward
from tests.chain.nets import NAMES, build


@pytest.mark.parametrize("name", NAMES)
def test_the_product_of_factors_is_autograds_gradient(name: str) -> None:
    model, loss_fn, batch = build(name)
    _, gradients = apply_factors(*factored_forward(model, loss_fn, batch), list(model.parameters()))
    factored = {n: gradients[id(p)] for n, p in model.named_parameters() if id(p) in gradients}
    assert all(p.grad is None for p in model.parameters())
    loss_fn(model, batch).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert factored.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(factored[key], grad, rtol=1e-10, atol=1e-14)


def test_gains_of_a_linear_chain_are_those_of_its_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4))).double()
    batch = torch.randn(3, 5).double()
    chain = gradient_chain(model, lambda m, x: m(x).square().sum(), batch, operator_norms=True)
    signal = 2 * model(batch).detach()
    expected = {}
    for k in (3, 2, 1, 0):
        below = signal @ model[k].weight.detach()
        expected[str(k)] = (float(signal.norm()), float(below.norm() / signal.norm()))
        sigma = float(torch.linalg.matrix_norm(model[k].weight.detach(), 2))
        assert chain.link(str(k)).operator_norm == pytest.approx(sigma, rel=1e-2)
        assert 0 < chain.link(str(k)).share <= 1 + 1e-2
        signal = below
    for name, (norm, gain) in expected.items():
        assert chain.link(name).signal == pytest.approx(norm, rel=1e-10)
        assert chain.link(name).gain == pytest.approx(gain, rel=1e-10)
    assert chain.ends["(input)"] == pytest.approx(float(signal.norm()), rel=1e-10)


def test_cumulative_gain_is_the_sum_of_the_logarithms_of_the_gains() -> None:
    model, loss_fn, batch = build("rnn")
    sequence = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).double()
    chain = gradient_chain(sequence, lambda m, x: m(x).square().sum(), torch.randn(2, 4).double())
    total = 0.0
    for link, below in zip(chain.links[1:], chain.links[2:], strict=False):
        total += math.log10(link.gain)
        assert below.cumulative == pytest.approx(total, abs=1e-9)
        assert below.above == link.name
    assert [link.name for link in chain.way("0")] == ["(loss)", "5", "4", "3", "2", "1", "0"]
    assert gradient_chain(model, loss_fn, batch).recurrences[0].name == "rnn"


def test_a_second_call_of_a_module_is_a_link_of_its_own() -> None:
    model, loss_fn, batch = build("residual")
    names = [link.name for link in gradient_chain(model, loss_fn, batch).links]
    assert "norm" in names and "norm#2" in names


def test_forward_and_backward_explosion_are_told_apart() -> None:
    forward = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()).double()
    with torch.no_grad():
        forward[1].weight.mul_(1e3)
    link = gradient_chain(forward, lambda m, x: m(x).sum(), torch.randn(3, 4).double()).link("1")
    assert link.forward_gain > 100 and link.gain > 100


def test_dictionary_is_plain_and_text_has_a_line_a_link() -> None:
    model, loss_fn, batch = build("lstm")
    chain = gradient_chain(model, loss_fn, batch)
    assert json.loads(json.dumps(chain.to_dict(), allow_nan=False))["links"][0]["name"] == "(loss)"
    assert len(chain.text().splitlines()) == 1 + len(chain.links) + len(chain.recurrences)
    assert len(chain.recurrences) == 4


def test_a_loss_that_is_not_finite_still_shows_the_activations() -> None:
    model, _, batch = build("two heads")
    chain = gradient_chain(model, lambda m, x: m(x)[0].sum() * float("inf"), batch)
    assert not math.isfinite(chain.loss) and len(chain.links) > 3
    json.dumps(chain.to_dict(), allow_nan=False)


def test_errors_name_the_remedy() -> None:
    model, loss_fn, batch = build("two heads")
    with pytest.raises(ValueError, match=r"'trunk\.9'.*Nearest: trunk"):
        gradient_chain(model, loss_fn, batch, at=["trunk.9"])
    with pytest.raises(ValueError, match=r"one scalar tensor, got shape \(5, 3\)"):
        gradient_chain(model, lambda m, x: m(x)[0], batch)
    with pytest.raises(ValueError, match="without a graph"):
        gradient_chain(model, lambda m, x: m(x)[0].detach().sum(), batch)
    with pytest.raises(KeyError, match="The chain has"):
        gradient_chain(model, loss_fn, batch).link("nowhere")


def test_the_figure_draws_every_link() -> None:
    model, loss_fn, batch = build("residual")
    chain = gradient_chain(model, loss_fn, batch)
    figure = chain.figure()
    shown = [link for link in chain.links if math.isfinite(link.cumulative)]
    *strokes, markers = figure.data
    assert list(markers.x) == list(range(len(shown)))
    assert [text.partition(" ")[0] for text in markers.hovertext] == [link.name for link in shown]
    assert "log10" in figure.layout.yaxis.title.text
    ends = {(stroke.x[0], stroke.x[1]) for stroke in strokes}
    place = {link.name: i for i, link in enumerate(shown)}
    assert ends == {(place[link.above], i) for i, link in enumerate(shown) if place.get(link.above, i) != i}


def test_the_figure_shows_a_hot_layer_at_its_own_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    with torch.no_grad():
        model[2].weight.mul_(100)
    chain = gradient_chain(model, lambda m, x: m(x).square().mean(), torch.randn(4, 16))
    *strokes, markers = chain.figure().data
    red = [link.name for link, tone in zip(chain.links, markers.marker.color, strict=True) if tone == "rgb(200,40,40)"]
    assert red == ["2"]
    (below,) = [stroke for stroke in strokes if stroke.line.color == "rgb(200,40,40)"]
    assert [chain.links[place].name for place in below.x] == ["2", "1"]


class _Diagonal(nn.Module):
    def forward(self, x):
        return x * torch.tensor([2.0, 7.0, 1.0])


def test_the_operator_norm_leaves_the_subspace_of_the_signal():
    """A loss that reads one entry of a diagonal factor: the gain is 2, and the largest singular value 7."""
    model = nn.Sequential(nn.Linear(3, 3), _Diagonal())
    chain = gradient_chain(model, lambda m, x: m(x)[:, 0].sum(), torch.ones(1, 3), operator_norms=True)
    link = chain.link("1")
    assert (link.gain, link.operator_norm) == (pytest.approx(2.0), pytest.approx(7.0, rel=1e-3))


class _Fourier(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)


def test_complex_signals_are_pairs_of_real_numbers():
    """A Fourier transform of length 4 is twice a unitary map, and every link above sends its whole signal."""
    model = nn.Sequential(nn.Linear(4, 4), _Fourier())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Casting complex values to real discards the imaginary part"
        chain = gradient_chain(model, lambda m, x: m(x).imag.square().sum(), torch.randn(2, 4), operator_norms=True)
    assert chain.link("1").operator_norm == pytest.approx(2.0, rel=1e-3)
    assert chain.link("1").above == "(loss)"
    assert chain.link("1").gain <= chain.link("1").operator_norm * (1 + 1e-6)


class _Twice(nn.Module):
    def forward(self, x):
        y = 2 * x
        return y, y


def test_a_tensor_that_is_returned_twice_is_one_joint():
    """dL/dy of y y is 2 y, and 2 x has gain 2; two joints would each carry half of the signal."""
    model = nn.Sequential(nn.Linear(3, 3), _Twice())
    x = torch.ones(1, 3)
    chain = gradient_chain(model, lambda m, x: torch.mul(*m(x)).sum(), x)
    assert chain.link("1").gain == pytest.approx(2.0)
    assert chain.link("1").signal == pytest.approx(2 * model[1](model[0](x))[0].norm().item())
