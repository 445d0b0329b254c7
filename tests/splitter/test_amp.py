"""A splitter under GradScaler: before and after its `unscale_`, and attached to optimizers that unscale themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

import gradsplit as gs
from tests.optim.amp_runs import HISTORY, INF, SCALE, assert_same, loss_of, scaler_of, train
from tests.optim.small import model_of

SPLITTERS = {
    "scale-free": HISTORY,
    "fixed": gs.Fixed(0.05),
    "relative": gs.Relative(0.02),
    "root": {"root": gs.Fixed(0.3), "tensor": gs.Ema(1.2, warmup=1), "bin": gs.Relative(0.05)},
}
OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.05),
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.05, fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9),
    "fused SGD": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, fused=True),
}


def run(optimizer_name, budget, way, *, overflow=None, steps=6):
    """Train and return weights, scales of all steps, and the splitter's history."""
    model = model_of()
    optimizer = OPTIMIZERS[optimizer_name](model)
    seen = []
    splitter = gs.GradientSplitter(
        model, budget=budget, optimizer=optimizer, sinks=[lambda r: seen.append(r.decision.scale_B.clone())]
    )
    scaler = None if way == "none" else scaler_of()
    between = {
        "none": splitter.step,
        "attached": lambda: None,
        "before unscale_": lambda: splitter.step(scaler=scaler),
        "after unscale_": lambda: (scaler.unscale_(optimizer), splitter.step(scaler=scaler)),
        "before, then unscale_": lambda: (splitter.step(scaler=scaler), scaler.unscale_(optimizer)),
    }[way]

    count = itertools.count()

    def spoil_and_bound():
        if next(count) == overflow:
            model[2].weight.grad[1, 2] = INF
        between()

    if way == "attached":
        splitter.attach(optimizer)
    train(model, optimizer, range(steps), scaler, spoil_and_bound)
    return model, splitter, seen, scaler


@pytest.mark.parametrize("way", ["attached", "before unscale_", "after unscale_", "before, then unscale_"])
@pytest.mark.parametrize("budget", SPLITTERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_splitter_under_a_scaler_decides_what_it_decides_without_one(optimizer, budget, way):
    plain, first, decided, _ = run(optimizer, SPLITTERS[budget], "none")
    model, second, again, scaler = run(optimizer, SPLITTERS[budget], way)
    assert scaler.get_scale() == SCALE
    assert any((scale_B < 1).any() for scale_B in decided), "no limit bound, so nothing was compared"
    for a, b in zip(decided, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    torch.testing.assert_close(first.ledger.state_dict(), second.ledger.state_dict(), rtol=1e-5, atol=1e-9)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["attached", "before unscale_", "after unscale_", "before, then unscale_"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_on_an_overflow_a_splitter_learns_nothing_and_the_scaler_still_sees_it(optimizer, way):
    """A splitter that zeroed the bad bin in front of `unscale_` would keep the scale too high for ever."""
    model, splitter, _, scaler = run(optimizer, HISTORY, way, steps=3)
    broken, other, _, halved = run(optimizer, HISTORY, way, steps=4, overflow=3)
    assert (scaler.get_scale(), halved.get_scale()) == (SCALE, SCALE / 2)
    assert_same(splitter.ledger.state_dict(), other.ledger.state_dict())
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in broken.parameters()])


@pytest.mark.parametrize("k", [-20, -3, 7, 30])
def test_gradients_times_two_to_the_k_give_the_same_scales_where_a_budget_is_free_of_units(k):
    model = model_of()
    records = []
    for factor in (1.0, 2.0**k):
        splitter = gs.GradientSplitter(model, budget=HISTORY)
        scales = []
        for step in range(6):
            model.zero_grad()
            loss_of(model, step).backward()
            for p in model.parameters():
                p.grad.mul_(factor)
            scales.append(splitter.step().decision.scale_B)
        records.append(torch.stack(scales))
    assert (records[0] < 1).any()
    torch.testing.assert_close(records[0], records[1], rtol=1e-9, atol=0)


def test_a_record_under_a_scaler_shows_norms_in_unscaled_units_and_names_what_overflowed():
    model = model_of()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), scaler_of()
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1e-3), optimizer=optimizer)
    scaler.scale(loss_of(model, 0)).backward()
    norm = model[0].weight.grad[3].norm().double() / SCALE
    model[2].weight.grad[1, 2] = INF
    kept = [p.grad.clone() for p in model.parameters()]
    record = splitter.step(scaler=scaler)
    torch.testing.assert_close(record.norm_B[3], norm, rtol=1e-6, atol=0)
    assert [report.name for report in record.worst(1)] == ["2.weight[1:2]"]
    assert (record.decision.scale_B == 1).all()
    assert_same(kept, [p.grad for p in model.parameters()])


def test_an_overflow_is_the_scalers_to_raise_and_a_disabled_scaler_is_none():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), optimizer=optimizer, on_nonfinite="raise")
    for scaler, raises in ((scaler_of(), False), (scaler_of(enabled=False), True)):
        scaler.scale(loss_of(model, 0)).backward()
        model[0].bias.grad.fill_(INF)
        if raises:
            with pytest.raises(FloatingPointError, match="expected finite gradients"):
                splitter.step(scaler=scaler)
        else:
            splitter.step(scaler=scaler)


def test_a_scaler_needs_to_know_whose_gradients_these_are():
    model = model_of()
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"step\(scaler=…\): expected an optimizer, .* Pass optimizer=… at constr"):
        gs.GradientSplitter(model, budget=gs.Fixed(1.0)).step(scaler=scaler_of())
