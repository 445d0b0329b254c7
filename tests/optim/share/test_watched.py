"""What a step by shares shows: how far it was turned, which rows stand at their limit, what the collective rule did."""

from __future__ import annotations

import pytest
import torch

import gradsplit as gs
from gradsplit.split import ShareRecord
from tests.optim.share.laws import rows_of, weights_of
from tests.optim.share.zoo import SHEETS, give, zoo

WAYS = {"definition": {"fused": False}, "default": {}}


def by_tensor(record, values_B):
    """The values of each tensor's bins, by name."""
    plan = record.plan
    return {name: values_B[torch.from_numpy(plan.tensor_B == t)] for t, name in enumerate(plan.layout.names)}


@pytest.mark.parametrize("way", WAYS)
def test_the_cosine_is_that_of_the_gradient_and_the_way_that_the_weights_went(way):
    model, seen = zoo(), []
    optimizer = gs.GSO(model, weight_decay=0.0, maximize=True, sinks=[seen.append], **WAYS[way])
    for step in range(4):
        before = weights_of(model)
        give(model, step, 300.0 if step == 3 else 1.0)
        optimizer.step()
        cosines = by_tensor(seen[-1], seen[-1].cosine_B)
        limited = by_tensor(seen[-1], seen[-1].at_limit_B)
        for name, new in weights_of(model).items():
            if not new.numel():
                continue
            gradient = rows_of(name, dict(model.named_parameters())[name].grad)
            moved = new - before[name]
            true = (moved * gradient).sum(1) / (moved.norm(dim=1) * gradient.norm(dim=1))
            free = ~limited[name]
            torch.testing.assert_close(
                cosines[name][free], true[free], rtol=0, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert bool(seen[-1].cosine_B.isfinite().any())
        assert (float(seen[-1].factor) < 1) == (step == 3)


@pytest.mark.parametrize("way", WAYS)
def test_rows_at_their_limit_and_rows_that_stayed_are_told(way):
    model, seen = zoo(), []
    optimizer = gs.GSO(model, lr=0.3, sinks=[seen.append], **WAYS[way])
    for _ in range(12):
        before = weights_of(model)
        for p in model.parameters():
            p.grad = -p.detach().clone()
        model.linear.weight.grad[1] = 0.0
        optimizer.step()
    record, limited = seen[-1], by_tensor(seen[-1], seen[-1].at_limit_B)
    moved, now = by_tensor(record, record.moved_B), weights_of(model)
    for name, sheet in SHEETS.items():
        if not now[name].numel():
            continue
        if sheet.what != "matrix":
            assert not limited[name].any(), name
        elif limited[name].any():
            length = now[name].norm(dim=1)[limited[name]]
            torch.testing.assert_close(length, torch.full_like(length, 3.0), rtol=1e-6, atol=0)
        stayed = (now[name] == before[name]).all(dim=1)
        stayed &= ~limited[name]  # a row that is drawn back may come out at the very bits that it had
        assert torch.equal(moved[name], ~stayed), name
    assert "back.weight[0:1]" in record.at_limit() and len(record.at_limit()) == int(record.at_limit_B.sum())
    assert not moved["linear.weight"][1] and moved["linear.weight"][0]
    angle = float(record.turned_B().nanmedian())
    said = f"; {len(record.at_limit())} at their growth limit; turned by {angle:.0f} degrees at the median"
    assert 0 < angle < 5 and str(record).endswith(said)


def test_angles_are_measured_where_somebody_watches():
    model = zoo()
    optimizer = gs.GSO(model)
    give(model, 0)
    optimizer.step()
    (record,) = optimizer.records
    assert isinstance(record, ShareRecord) and record.cosine_B is None
    assert record.turned_B() is None and record.most_turned() == []
    assert "turned" not in str(record)
    optimizer.measures = True
    optimizer.step()
    (record,) = optimizer.records
    turned = record.turned_B()
    most = record.most_turned(3)
    assert [angle for _, angle in most] == sorted((float(a) for a in turned if not a.isnan()), reverse=True)[:3]


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside backward"])
def test_parts_of_their_own_are_watched_too(inside):
    torch.manual_seed(0)
    model, seen = torch.nn.Linear(5, 4), []
    optimizer = gs.GSO(model, sinks=[seen.append], in_backward=inside)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(7, 5)).square().mean().backward()
        optimizer.step()
    assert [record.step for record in seen] == ([0, 0, 1, 1] if inside else [0, 1])
    assert all(bool(record.cosine_B.isfinite().all()) for record in seen)


def test_watching_changes_no_bit_and_reads_no_value(monkeypatch):
    """Where a number of a tensor is read, a device is waited for."""
    models = [zoo(torch.float32) for _ in range(2)]
    optimizers = [gs.GSO(model, capturable=True, fused=False) for model in models]
    optimizers[1].measures = True
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            give(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))

    def refuse(self, *_):
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as m:
        m.setattr(torch.compiler, "is_compiling", lambda: True)  # the one reading that is free on the CPU is left out
        for reading in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy"):
            m.setattr(torch.Tensor, reading, refuse)
        optimizers[1].step()
    assert optimizers[1].records[0].step == 3
