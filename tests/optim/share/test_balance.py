"""Vectors may change the loss by no more than matrices do: where they would, their share is shortened."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.lab.registry import workload
from gradsplit.optim.share import ShareUpdate
from gradsplit.series import Series
from tests.optim.share import test_series
from tests.optim.share.zoo import SHEETS, assert_follows, follow, give, oracle_of, zoo

CASES = pytest.mark.parametrize("fused", [False, None], ids=["definition", "default"])
VECTORS = [name for name, sheet in SHEETS.items() if sheet.what == "vector"]


def enlarge(model: nn.Module, times: float, names: list[str] = VECTORS) -> None:
    for name, p in model.named_parameters():
        if name in names and p.grad is not None:
            p.grad *= times


@CASES
def test_vectors_that_outweigh_the_matrices_follow_the_formulas(fused):
    model = zoo(torch.float64)
    optimizer, oracle, seen = gs.GSO(model, fused=fused), oracle_of(model, SHEETS), []
    for step in range(8):
        give(model, step)
        enlarge(model, 1.0 if step in (2, 6) else 1e3)
        if step == 4:
            next(p for name, p in model.named_parameters() if name == VECTORS[0]).grad[0] = math.nan
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)
        (record,) = optimizer.records
        assert float(record.balance) == pytest.approx(oracle.calm, rel=1e-9)
        seen.append(oracle.calm)
    assert seen[2] == 1 and max(seen[:2]) < 0.9


@CASES
def test_in_a_deep_series_they_may_do_less(fused):
    model = test_series.deep()
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    optimizer, oracle = gs.GSO(model, fused=fused), oracle_of(model, test_series.sheets_of(model))
    for step in range(3):
        test_series.give_series(model, step)
        enlarge(model, 1e3, biases)
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)
        assert float(optimizer.records[0].balance) == pytest.approx(oracle.calm, rel=1e-9) and oracle.calm < 0.2


@CASES
def test_one_vector_whose_gradient_explodes_does_not_stop_the_others(fused):
    runs = []
    for times in (1.0, 1e9):
        model = zoo(torch.float32)
        optimizer = gs.GSO(model, fused=fused)
        for step in range(4):
            give(model, step)
            enlarge(model, times, VECTORS[:1])
            optimizer.step()
            assert float(optimizer.records[0].balance) == 1
        runs.append({name: p.detach().clone() for name, p in model.named_parameters() if name != VECTORS[0]})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@CASES
def test_vectors_alone_move_by_their_whole_share(fused):
    p = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    optimizer = gs.GSO([("gain", p)], lr=0.3, weight_decay=0.0, fused=fused)
    p.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 2 - 0.1 * 2, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain-stack", {"depth": 12}),
        ("residual-stack", {"gain": 3.0}),
        ("residual-stack", {"gain": 0.5}),
        ("detection", {}),
        ("detection", {"healthy": True}),
        ("aerial", {}),
        ("gpt", {}),
        ("lstm", {}),
        ("temporal-order", {}),
        ("diffusion", {}),
        ("control", {}),
    ],
)
def test_the_project_s_own_tasks_do_not_notice(name, options):
    task = workload(name).build(seed=0, **options)
    optimizer = gs.GSO(task.model)
    for step in range(4):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
        assert float(optimizer.records[0].balance) == 1


def _spread(values: torch.Tensor) -> float:
    """What differs from image to image, over the whole."""
    return float((values - values.mean(0)).norm() / values.norm())


def test_biases_do_not_drown_the_signal_of_146_layers():
    """Of the values in front of the head, what differs from image to image stays; without the rule it is lost."""
    task, spread = workload("deep-stack").build(seed=10), []
    optimizer = gs.GSO(task.model)
    task.model.head.register_forward_pre_hook(lambda _, given: spread.append(_spread(given[0].detach())))
    for step in range(10):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
    assert min(spread) > 0.01


def test_inside_backward_vectors_meet_the_matrices_that_came_before():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(6)))
    optimizer = gs.GSO(model, in_backward=True)
    before = model[0].bias.detach().clone()
    for layer in model:  # the values inside are a hundredth of what biases are
        layer.weight.data *= 0.01
    model(torch.full((2, 4), 0.01, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert 0 < float((model[0].bias.detach() - before).abs().max()) < 3e-3  # 0.01 without the rule


def test_groups_of_their_own_plan_are_weighed_together():
    model = zoo(torch.float64)
    pairs = list(model.named_parameters())
    matrices = [pair for pair in pairs if pair[0] not in VECTORS]
    vectors = [pair for pair in pairs if pair[0] in VECTORS]
    groups = [{"params": matrices}, {"params": vectors, "plan": "per_tensor"}]
    whole, parts = zoo(torch.float64), gs.GSO(groups)
    one = gs.GSO(whole)
    for step in range(3):
        for each, optimizer in ((whole, one), (model, parts)):
            give(each, step)
            enlarge(each, 1e3)
            optimizer.step()
        assert float(parts.records[1].balance) == pytest.approx(float(one.records[0].balance))
        assert float(one.records[0].balance) < 1


def _in_any_series(self, change_T, vector_T):
    self._factor = None
    return _BALANCE(self, change_T, vector_T)


def _unbounded(self, change_T, vector_T):
    matrices, vectors = change_T[vector_T == 0].sum(), change_T[vector_T > 0].sum()
    return torch.where(vectors > matrices, matrices / vectors, 1.0).double()


def _all_tensors(self, *given):
    made = _FACTOR(self, *given)
    return made * self.balance


_FACTOR, _BALANCE = ShareUpdate._factor_T, Series.balance

FAULTS = {
    "never": (Series, "balance", lambda self, change_T, _: torch.ones_like(self.of_late)),
    "twice as late": (Series, "balance", lambda self, c, v: _BALANCE(self, torch.where(v > 0, c / 2, c), v)),
    "no vector is held": (Series, "balance", _unbounded),
    "in deep series too": (Series, "balance", _in_any_series),
    "matrices too": (ShareUpdate, "_factor_T", _all_tensors),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    monkeypatch.setattr(*FAULTS[name])
    with pytest.raises(AssertionError):
        test_vectors_that_outweigh_the_matrices_follow_the_formulas(False)
        test_in_a_deep_series_they_may_do_less(False)
