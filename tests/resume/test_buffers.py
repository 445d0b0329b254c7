"""A rollback sets back every buffer, in the state dict or not, and names what it could not set back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradsplit as gs
from tests.resume.runs import sgd


class Scaled(nn.Module):
    """A running maximum of the input, as a buffer of one kind, divides the output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map, self.kind = nn.Linear(4, 1), kind
        size = torch.ones(())
        if kind == "plain":
            self.size = size
        else:
            self.register_buffer("size", size, persistent=kind == "persistent")
        if kind == "none at first":
            self.size = None
        if kind == "expanded":
            self.size = size.expand(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x.detach().abs().amax()
        if self.kind == "none at first":
            before = torch.ones(()) if self.size is None else self.size
            self.size = torch.maximum(before, seen)
        elif self.kind == "replaced":
            self.size = torch.maximum(self.size, seen)
        elif self.kind == "grown":
            self.size = torch.cat([self.size.reshape(-1), seen.reshape(1)])
        elif self.kind == "expanded":
            self.size = torch.maximum(self.size, seen)
        else:
            self.size.copy_(torch.maximum(self.size, seen))
        return self.map(x / self.size.amax())


def run(kind: str, folder=None) -> tuple[Scaled, gs.Guard]:
    model = Scaled(kind)
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=1, folder=folder)
    for scale in [1.0, 1.0, 1.0, math.inf, 1.0, 1.0, 1.0]:
        optimizer.zero_grad()
        loss = (model(torch.full((8, 4), 2.0) * scale) - 1).square().mean()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    return model, guard


KINDS = ["persistent", "not persistent", "replaced", "grown", "none at first", "expanded"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_batch_with_inf_costs_one_rollback_whatever_keeps_the_running_value(kind: str, on_disk: bool, tmp_path):
    model, guard = run(kind, tmp_path if on_disk else None)
    (action,) = guard.actions
    assert action.kind == "rolled_back" and action.to_step == 3
    assert "not set back" not in action.reason
    assert float(model.size.amax()) == 2.0
    if kind == "grown":
        assert model.size.tolist() == [1.0] + [2.0] * 6


def test_a_tensor_that_is_no_buffer_is_named() -> None:
    model = Scaled("plain")
    guard = gs.Guard(model, sgd(model))
    guard._first_snapshot()
    model.size.fill_(math.nan)
    assert guard.roll_back().reason == "asked for; not set back, since the snapshot has no such buffers: size"


def test_a_buffer_that_came_or_went_is_named_and_the_rest_is_set_back() -> None:
    model = Scaled("not persistent")
    model.register_buffer("gone", torch.zeros(2), persistent=False)
    guard = gs.Guard(model, sgd(model))
    guard._first_snapshot()
    before = model.map.weight.detach().clone()
    del model.gone
    model.map.register_buffer("new", torch.ones(2))
    model.map.register_buffer("own", torch.ones(2), persistent=False)
    with torch.no_grad():
        model.map.weight.add_(1.0)
        model.size.fill_(9.0)
    assert guard.roll_back().reason.endswith("no such buffers: gone, map.new, map.own")
    assert torch.equal(model.map.weight, before) and float(model.size) == 1.0
    assert model.map.new.tolist() == [1.0, 1.0]


def test_buffers_of_an_average_beside_the_model_are_set_back() -> None:
    model, average = Scaled("not persistent"), Scaled("not persistent")
    guard = gs.Guard(model, sgd(model), others={"average": average})
    guard._first_snapshot()
    average.size.fill_(math.inf)
    guard.roll_back()
    assert float(average.size) == 1.0


def test_a_lazy_model_gets_its_first_snapshot_when_it_has_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guard = gs.Guard(model, optimizer)
    for scale in guard.batches([1.0, math.nan]):
        optimizer.zero_grad()
        loss = scale * model(torch.ones(2, 4)).mean()
        loss.backward()
        optimizer.step()
        guard.step(loss)
    assert [action.to_step for action in guard.actions] == [0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    "value, said",
    [
        (torch.ones(2), r"loss=shape \(2,\), torch\.float32"),
        (torch.ones(()) * 1j, r"loss=shape \(\), torch\.complex64"),
        (torch.empty(0), r"loss=shape \(0,\)"),
        (None, "loss=NoneType"),
        ([1.0], "loss=list"),
        (torch.ones(2).numpy(), "loss=ndarray"),
        ("1.0", "loss=str"),
    ],
)
def test_a_loss_that_is_not_one_number_is_refused_and_nothing_happened(value, said: str) -> None:
    model = Scaled("persistent")
    guard = gs.Guard(model, sgd(model))
    with pytest.raises(ValueError, match=rf"Guard\.step\({said}.*Pass loss\.mean\(\), or a float"):
        guard.step(value)
    assert guard.step_count == 0 and len(guard._pending) == 0
    guard.step(torch.ones(1, 1))
    guard.step(torch.ones(()).numpy())
    assert guard.step_count == 2


class Holder(nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", tensor)


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.ones(2, dtype=torch.complex128), "torch.complex128"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused_by_name(made, said: str, tmp_path) -> None:
    path, model = tmp_path / "run.ckpt", Holder(made())
    with pytest.raises(TypeError, match=rf"safetensors.*got {said} at 'model\.table'\. Use format='torch'"):
        gs.save_checkpoint(path, format="safetensors", model=model)
    assert not list(tmp_path.iterdir())
    gs.save_checkpoint(path, model=model)
    gs.load_checkpoint(path, model=model)


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: nn.LazyLinear(2), "without a shape yet"),
        (lambda: nn.Linear(2, 2, device="meta"), "on the meta device"),
    ],
)
def test_tensors_without_values_are_refused_by_name(made, said: str, tmp_path) -> None:
    with pytest.raises(TypeError, match=rf"save_checkpoint\(model=…\)\['weight'\]: expected tensors with .* {said}"):
        gs.save_checkpoint(tmp_path / "run.ckpt", model=made())
    assert not list(tmp_path.iterdir())
