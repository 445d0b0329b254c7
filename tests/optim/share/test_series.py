"""Layers in series: their number is read off the gradient, and where they are many the share is shortened."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit import series
from gradsplit.lab.registry import workload
from gradsplit.optim.share import ShareUpdate
from tests.optim.share.oracle import Sheet
from tests.optim.share.zoo import SHEETS, assert_follows, follow, give, gradient_of, oracle_of, zoo

LAYERS = 30
CASES = pytest.mark.parametrize("fused", [False, None], ids=["definition", "default"])


class Deep(nn.Module):
    """Words and squares in series, and biases, which do not count."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=k % 3 == 0) for k in range(layers - 1))


def deep(layers: int = LAYERS, dtype: torch.dtype = torch.float64) -> Deep:
    torch.manual_seed(0)
    return Deep(layers).to(dtype)


def sheets_of(model: nn.Module) -> dict[str, Sheet]:
    return {
        name: Sheet("embedding", 5, 4)
        if p.shape[0] == 5
        else Sheet("matrix", 4, 4)
        if p.dim() > 1
        else Sheet("vector", 1, 4)
        for name, p in model.named_parameters()
    }


def give_series(model: nn.Module, step: int, size: float = 1.0, but: int = 0) -> None:
    """Random gradients whose product with the weights is 1 in each of the first tensors, and 0 in the last ``but``."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    for t, p in enumerate(model.parameters()):
        p.grad = gradient_of(p, 1000 * step + t)
    for k, p in enumerate(matrices):
        w, wanted = p.detach(), float(k < len(matrices) - but)
        p.grad += (wanted - (p.grad * w).sum()) / w.square().sum() * w
    for p in model.parameters():
        p.grad *= size


@CASES
def test_a_deep_series_follows_the_formulas(fused):
    model = deep()
    optimizer, oracle = gs.GSO(model, fused=fused), oracle_of(model, sheets_of(model))
    seen = []
    for step in range(12):
        give_series(model, step, size=300.0 if step == 7 else 1.0, but=12 if step in (3, 4, 5) else 0)
        if step == 6:
            model.layers[4].weight.grad = None
        if step in (0, 9):
            model.layers[2].weight.grad[1, 2] = math.nan
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)
        (record,) = optimizer.records
        assert float(record.series) == pytest.approx(oracle.series, rel=1e-9)
        seen.append(oracle.series)
    assert LAYERS - 2 < seen[0] < LAYERS + 2 and seen[2] == pytest.approx(LAYERS, abs=1)
    assert seen[5] == pytest.approx(seen[2] * series.FADES**3)
    assert oracle.fired == [7]


@CASES
@pytest.mark.parametrize(("layers", "share"), [(14, 0.1), (28, 0.025)])
def test_rows_move_by_the_shortened_share(fused, layers, share):
    """Up to 14 layers the share is whole; twice as many move by a quarter of it."""
    model = deep(layers)
    optimizer = gs.GSO(model, lr=0.1, weight_decay=0.0, fused=fused)
    before = [p.detach().clone() for p in model.parameters()]
    give_series(model, 0)
    optimizer.step()
    for p, w in zip(model.parameters(), before, strict=True):
        if p.shape == (4, 4):
            moved = (p.detach() - w).norm(dim=1) / w.norm(dim=1).clamp(min=0.2)  # the least length of 4 entries
            torch.testing.assert_close(moved, torch.full_like(moved, share))


def test_what_is_not_deep_is_the_same_bit_for_bit(monkeypatch):
    runs = []
    for factor in (series.shortened, lambda number: torch.ones_like(number)):
        monkeypatch.setattr(series, "shortened", factor)
        model = zoo(torch.float32)
        optimizer = gs.GSO(model)
        for step in range(6):
            give(model, step)
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
        assert float(optimizer.records[0].series) < series.DEEP
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len(SHEETS) == len(runs[0])


@pytest.mark.parametrize(
    ("name", "options", "least", "most"),
    [
        ("plain-stack", {"depth": 20}, 20.9, 21.1),
        ("plain-stack", {"depth": 12}, 12.9, 13.1),
        ("residual-stack", {"gain": 0.5}, 1.0, 13.0),
        ("detection", {}, 1.0, 8.0),
        ("gpt", {}, 0.0, 5.0),
        ("lstm", {}, 0.0, 5.0),
    ],
)
def test_the_number_of_layers_in_series_of_the_project_s_own_tasks(name, options, least, most):
    """Convolutions and the head of a plain stack, one by one; a norm or a way around ends a series."""
    task = workload(name).build(seed=0, **options)
    optimizer = gs.GSO(task.model)
    for step in range(2):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
        if step == 0:
            assert least <= float(optimizer.records[0].series) <= most
    assert float(optimizer.records[0].series) <= most


def test_a_head_that_begins_at_zero_hides_the_series_for_one_step():
    task = workload("plain-stack").build(seed=0, depth=20)
    nn.init.zeros_(task.model.head.weight)
    optimizer, seen = gs.GSO(task.model), []
    for step in range(2):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
        seen.append(float(optimizer.records[0].series))
    assert seen[0] == 0 and seen[1] > 15


def test_146_layers_do_not_overflow():
    """Whole shares let the signal of 146 layers grow a thousandfold within three steps."""
    task = workload("deep-stack").build(seed=0)
    optimizer, losses = gs.GSO(task.model), []
    for step in range(12):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) < 3.0


def _trained(model: nn.Module, optimizer: gs.GSO, steps: range) -> list[torch.Tensor]:
    for step in steps:
        give_series(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@CASES
def test_saving_and_loading_keeps_the_number(fused):
    whole, model = deep(), deep()
    wanted = _trained(whole, gs.GSO(whole, fused=fused), range(4))
    first = gs.GSO(model, fused=fused)
    _trained(model, first, range(2))
    second = gs.GSO(model, fused=fused)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(_trained(model, second, range(2, 4)), wanted, strict=True))


def test_a_state_of_before_without_the_number_is_loaded():
    model = deep()
    first = gs.GSO(model)
    _trained(model, first, range(2))
    saved = copy.deepcopy(first.state_dict())
    for part in saved["gradsplit"]:
        del part["share"]["series"]
    second = gs.GSO(model)
    second.load_state_dict(saved)
    _trained(model, second, range(2, 3))
    assert float(second.records[0].series) == pytest.approx(LAYERS)


def test_groups_of_their_own_plan_share_the_number():
    """The first part sees its own layers in the first step, and from then on all."""
    model = deep()
    pairs = list(model.named_parameters())
    optimizer = gs.GSO([{"params": pairs[:20]}, {"params": pairs[20:], "plan": "per_tensor"}])
    seen = []
    for step in range(2):
        _trained(model, optimizer, range(step, step + 1))
        seen.append([float(record.series) for record in optimizer.records])
    assert seen == [[pytest.approx(LAYERS)] * 2] * 2


def test_inside_backward_the_layers_add_up():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(20)))
    optimizer = gs.GSO(model, in_backward=True)
    before = model[0].weight.detach().clone(), model[19].weight.detach().clone()
    model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert float(optimizer.records[0].series) == pytest.approx(20)
    moved = [
        float(((p.detach() - w).norm(dim=1) / w.norm(dim=1)).max())
        for p, w in zip((model[0].weight, model[19].weight), before, strict=True)
    ]
    assert moved[0] == pytest.approx(0.03 * (14 / 20) ** 2, rel=0.02) and moved[1] == pytest.approx(0.03, rel=0.02)


def test_a_step_that_fails_does_not_count(monkeypatch):
    model = deep()
    optimizer = gs.GSO(model, fused=False)
    give_series(model, 0)
    update = optimizer._parts[0].update
    monkeypatch.setattr(update, "_moved", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    monkeypatch.undo()
    give_series(model, 0, but=12)
    optimizer.step()
    assert float(optimizer.records[0].series) == pytest.approx(LAYERS - 12)


def test_a_traced_step_is_the_plain_one():
    models = [deep() for _ in range(2)]
    optimizers = [gs.GSO(model, fused=False) for model in models]
    traced = torch.compile(optimizers[1].step, backend="eager")
    for step in range(3):
        for model, make in zip(models, (optimizers[0].step, traced), strict=True):
            give_series(model, step, but=12 * (step > 0))
            make()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert float(optimizers[1]._series.of_late) == pytest.approx(LAYERS * series.FADES**2)


def _leaves_words_out(self, euler_B, *others):
    return _FACTOR(self, torch.where(self._tensor_B == 0, 0.0, euler_B), *others)


def _counts_bad_rows(self, euler_B, *others):
    return _FACTOR(self, torch.where(euler_B == 0, 1.0, euler_B), *others)


_FACTOR = ShareUpdate._factor_T

FAULTS = {
    "embeddings do not count": (ShareUpdate, "_factor_T", _leaves_words_out),
    "bad rows count": (ShareUpdate, "_factor_T", _counts_bad_rows),
    "the number never fades": (series, "FADES", 1.0),
    "deep from 10 on": (series, "DEEP", 10.0),
    "in proportion, not its square": (series, "shortened", lambda number: series.DEEP / number.clamp(min=series.DEEP)),
    "nothing is remembered": (series.Series, "settle", series.Series.forget),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError):
        test_a_deep_series_follows_the_formulas(False)
