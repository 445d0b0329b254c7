"""A sample that is not finite is masked: the others get the gradient of the batch without it, per kind of layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradsplit.sources import RunningLimit, SampleSplitter
from tests.sources.cases import CASES, grads, made

LOOSE = RunningLimit(factor=1e12)  # masks alone
BAD = {1: math.nan, 4: math.inf}
GOOD = [0, 2, 3, 5, 6]


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y.flatten(1) - target.flatten(1)).square().sum()


def positions(model: nn.Module) -> list[str]:
    """The parameters without a rule, which the model's own layers protect from below and above."""
    return [name for name, _ in model.named_parameters() if name == "position"]


def without_bad(model: nn.Module, x: Tensor, good: list[int] = GOOD) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    target = torch.randn_like(model(x))
    clean = x[good].clone().requires_grad_()
    loss_of(model(clean), target[good]).backward()
    return grads(model), clean.grad, target


@pytest.mark.parametrize("name", CASES)
def test_bad_inputs_leave_the_gradient_of_the_batch_without_them(name):
    model, x = made(name)
    expected, expected_x, target = without_bad(model, x)
    for index, value in BAD.items():
        x[index].view(-1)[1] = value
    x.requires_grad_()
    with SampleSplitter(model, LOOSE, leave_out=positions(model)) as splitter:
        loss_of(model(x), target).backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(
            grad, expected[key], rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )
    torch.testing.assert_close(x.grad[GOOD], expected_x, rtol=1e-6, atol=1e-9)
    assert x.grad[list(BAD)].abs().max() == 0
    assert {row.sample for row in splitter.named()} == set(BAD)
    assert {row.ratio for row in splitter.named()} == {"not finite"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_signal_leaves_the_gradient_of_the_batch_without_it(name, value):
    model, x = made(name)
    expected, _, target = without_bad(model, x)
    weight = torch.ones(len(x), dtype=torch.float64)
    weight[list(BAD)] = value
    with SampleSplitter(model, LOOSE, leave_out=positions(model)):
        y = model(x)
        ((y - target).square().flatten(1).sum(1) * weight).sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(
            grad, expected[key], rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", CASES)
def test_a_healthy_batch_has_the_ordinary_gradient_and_output(name):
    model, x = made(name)
    plain = model(x)
    plain.square().sum().backward()
    expected = grads(model)
    with SampleSplitter(model, LOOSE, leave_out=positions(model)) as splitter:
        y = model(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, plain, rtol=0, atol=0)
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12)
    assert splitter.named() == []


def test_embedding_masks_the_sample_whose_signal_is_bad():
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0, scale_grad_by_freq=True), nn.Linear(4, 2)).double()
    ids = torch.tensor([[1, 2, 0], [3, 3, 4], [1, 5, 6], [7, 0, 8]])
    weight = torch.tensor([1.0, math.nan, 1.0, 1.0], dtype=torch.float64)
    good = [0, 2, 3]
    loss_of(model(ids[good]), torch.zeros(3, 3, 2).double()).backward()
    expected = grads(model)
    with SampleSplitter(model, LOOSE, leave_out=positions(model)):
        (model(ids).square().flatten(1).sum(1) * weight).sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])


def test_a_nan_born_inside_the_model_is_stopped_where_it_is_born():
    class Born(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.low(x)
            # 0 / 0 where the row of x is constant
            return self.high(h * (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0))

    torch.manual_seed(0)
    model, x = Born().double(), torch.randn(5, 3).double()
    x[2] = 7.0
    good = [0, 1, 3, 4]
    model(x[good]).square().sum().backward()
    expected = grads(model)
    model(x).square().sum().backward()
    assert grads(model)["low.weight"].isnan().any(), "the fault is planted"
    with SampleSplitter(model, LOOSE, leave_out=positions(model)) as splitter:
        model(x).square().sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])
    assert {(row.sample, row.layer) for row in splitter.named()} == {(2, "high"), (2, "low")}


@pytest.mark.parametrize("path", ["the look of the CPU", "no look"])
def test_the_masked_path_without_a_bad_sample_gives_the_same_numbers(path, monkeypatch):
    """What a device does, where nobody looks: every sample goes through the masks."""
    model, x = made("deep")
    model(x).square().sum().backward()
    expected = grads(model)
    if path == "no look":
        for part in ("layers", "ends", "samples"):
            monkeypatch.setattr(f"gradsplit.sources.{part}.looks", lambda tensor: False)
    with SampleSplitter(model, LOOSE, leave_out=positions(model)):
        model(x).square().sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])


def test_a_finite_row_whose_float32_norm_overflows_is_bounded_not_masked():
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 1.0], [3e30, 0.0], [1.0, 2.0]])
    with SampleSplitter(model, "regression") as splitter:
        model(x).sum().backward()
    (row,) = splitter.named()
    assert row.sample == 1
    assert isinstance(row.ratio, float)
    limit = 3 * math.sqrt(5)  # the median is that of the third row
    torch.testing.assert_close(model.weight.grad, torch.tensor([[2.0 + limit, 3.0]]))
