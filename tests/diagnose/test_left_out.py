"""A NaN of the forward pass that the loss leaves out is told from one of the backward pass; nothing is disturbed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradsplit.diagnose import diagnose


class Operation(nn.Module):
    def __init__(self, change: object) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def share(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


def net(change: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3, bias=False), Operation(change), nn.Linear(3, 3), nn.Linear(3, 1))


def rows() -> Tensor:
    """Three samples; the last one holds zeros, so that its share is 0 / 0."""
    x = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    x[2] = 0
    return x


def first(model: nn.Module, loss_fn: object, batch: object) -> tuple[str, str, str]:
    finding = next(f for f in diagnose(model, loss_fn, batch).findings if f.kind == "nonfinite")
    return finding.name, finding.sentence, finding.evidence


LOSSES = {
    "a slice": lambda m, x: m(x)[:2].mean(),
    "an index": lambda m, x: m(x)[torch.tensor([True, True, False])].mean(),
    "where": lambda m, x: torch.where(x.sum(-1, keepdim=True) > 0, m(x), torch.zeros(())).mean(),
    "nanmean": lambda m, x: m(x).nanmean(),
    "nan_to_num": lambda m, x: m(x).nan_to_num().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_module_that_made_a_masked_nan_is_named(name: str) -> None:
    found, sentence, evidence = first(net(share), LOSSES[name], rows())
    assert found == "1"
    assert sentence == "1: it makes the first NaN of the forward pass, which does not reach the loss"
    assert "the loss is finite, since it leaves the NaN out" in evidence and "3 is the first to meet" in evidence


def test_a_masked_inf_is_named_too() -> None:
    found, sentence, _ = first(net(lambda x: 1 / x), LOSSES["a slice"], rows())
    assert found == "1" and "first inf of the forward pass" in sentence


def test_a_nan_in_the_data_that_the_loss_leaves_out_is_the_data_s() -> None:
    x = rows()
    x[2, 0] = float("nan")
    found, sentence, _ = first(net(torch.tanh), LOSSES["a slice"], x)
    assert (found, sentence) == ("(input)", "(input): the batch is not finite, and the loss leaves that out")


def test_code_between_modules_that_makes_it_is_the_root_s() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(3, 3, bias=False), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.above(share(self.below(x)))

    torch.manual_seed(0)
    found, sentence, _ = first(Root(), LOSSES["a slice"], rows())
    assert (found, sentence) == (
        "(root)",
        "(root): code between its modules makes the first NaN of the forward pass",
    )


def test_a_break_of_the_backward_pass_is_still_its_own() -> None:
    model = net(lambda x: x + (x * 0).abs().sqrt())
    found, sentence, _ = first(model, lambda m, x: m(x).mean(), rows() + 1)
    assert found == "1" and "the backward pass breaks there" in sentence


def test_a_mask_of_minus_infinity_is_not_taken_for_the_fault() -> None:
    torch.manual_seed(0)
    mask = torch.triu(torch.full((3, 3), -torch.inf), 1)
    model = nn.Sequential(
        nn.Linear(3, 3, bias=False),
        Operation(lambda x: x + (x * 0).abs().sqrt()),
        Operation(lambda x: x + mask),
        nn.Softmax(-1),
        nn.Linear(3, 1),
    )
    found, sentence, _ = first(model, lambda m, x: m(x).mean(), rows() + 1)
    assert found == "1" and "the backward pass breaks there" in sentence
    sound = nn.Sequential(model[0], *model[2:])
    assert not [f for f in diagnose(sound, lambda m, x: m(x).mean(), rows()).findings if f.kind == "nonfinite"]


def test_what_a_sound_gradient_never_meets_is_no_finding() -> None:
    """The guarded form: the bad row is replaced before the division, so the NaN is nowhere."""
    model = net(lambda x: x / torch.where(x.sum(-1, keepdim=True) == 0, torch.ones(()), x.sum(-1, keepdim=True)))
    assert not [f for f in diagnose(model, LOSSES["a slice"], rows()).findings if f.kind == "nonfinite"]


class Drawing(nn.Module):
    """It draws from every generator there is, and replaces a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 1)
        self.own = {"python": random.Random(1), "numpy": np.random.default_rng(1)}
        self.torch = torch.Generator().manual_seed(1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("wide", torch.ones(()).expand(3))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.calls += 1
        self.late = x.detach()
        noise = random.random() + self.own["python"].random() + self.own["numpy"].random()
        noise = noise + np.random.rand()  # noqa: NPY002
        noise = noise + torch.rand(()) + torch.rand((), generator=self.torch)
        return self.map(x * self.wide + 1e-3 * noise)


def drawn(model: Drawing, other: random.Random) -> list[float]:
    own = model.own
    return [
        random.random(),
        float(np.random.rand()),  # noqa: NPY002
        float(torch.rand(())),
        own["python"].random(),
        float(own["numpy"].random()),
        float(torch.rand((), generator=model.torch)),
        other.random(),
    ]


def seeded() -> tuple[Drawing, random.Random]:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    return Drawing(), random.Random(2)


@pytest.mark.parametrize("fails", [False, True])
def test_generators_and_buffers_are_left_as_they_were(fails: bool) -> None:
    model, other = seeded()
    expected = drawn(model, other)
    model, other = seeded()
    mean, calls = model.mean, model.calls

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        value = m(x).square().mean() * (1 + other.random())
        return value.repeat(2) if fails else value

    if fails:
        with pytest.raises((ValueError, RuntimeError)):
            diagnose(model, loss, torch.ones(4, 3))
    else:
        diagnose(model, loss, torch.ones(4, 3), torch.optim.SGD(model.parameters(), 0.1))
    assert drawn(model, other) == expected
    assert model.mean is mean and model.calls is calls and model.late is None
    assert mean.tolist() == [0.0] * 3 and calls.item() == 0
