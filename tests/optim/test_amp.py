"""Mixed precision: GradScaler in front of GSO and of optimizers with a splitter, bfloat16 autocast."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import gradsplit as gs

SCALE = 2.0**16
INF = float("inf")
HISTORY = (gs.Ema(1.1, warmup=1), gs.ZScore(1.0, warmup=2), gs.Percentile(0.5))


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loss_of(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return (model(x) - 3).square().mean() * (30.0 if step == 2 else 1.0)


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000, **options)


def snapshot(model, optimizer):
    """Everything that a step may move."""
    return copy.deepcopy((list(model.parameters()), optimizer.state_dict()))


def assert_same(a, b):
    """Equal bit for bit, whatever they are made of."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def train(model, optimizer, steps, scaler=None, between=None):
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if between is not None:
            between()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


OPTIONS = {
    "default": {},
    "eager": {"backend": "eager"},
    "bin": {"second_moment": "bin"},
    "history": {"budget": (*HISTORY, gs.RelativeStep())},
    "root": {"budget": {"root": gs.Fixed(2.0), "bin": gs.Relative(0.2)}},
    "groups": {"maximize": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gso_under_a_scaler_makes_the_steps_that_it_makes_without_one(name, unscale):
    """Scales are powers of two, so limits hold in unscaled units to the last bit that the paths share."""
    model, other = model_of(), model_of()
    plain, scaled = (gs.GSO(m, lr=0.05, **OPTIONS[name]) for m in (model, other))
    scaler = scaler_of()
    train(model, plain, range(6))
    train(other, scaled, range(6), scaler, (lambda: scaler.unscale_(scaled)) if unscale else None)
    assert scaler.get_scale() == SCALE
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert plain.state[p]["step"] == scaled.state[q]["step"] == 6


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bad", [INF, float("nan")])
def test_on_an_overflow_gso_moves_nothing_counts_nothing_and_learns_nothing(name, unscale, bad):
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, **OPTIONS[name]), scaler_of()
    between = (lambda: scaler.unscale_(optimizer)) if unscale else None
    train(model, optimizer, range(3), scaler, between)
    before = snapshot(model, optimizer)

    def break_one():
        model[2].weight.grad[1, 2] = bad
        if unscale:
            scaler.unscale_(optimizer)

    train(model, optimizer, [3], scaler, break_one)
    assert_same(before, snapshot(model, optimizer))
    assert scaler.get_scale() == SCALE / 2
    train(model, optimizer, [4], scaler, between)
    assert all(optimizer.state[p]["step"] == 4 for p in model.parameters())


def test_an_overflow_in_the_first_step_leaves_moments_of_zero():
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05), scaler_of()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, [0], scaler, lambda: model[0].bias.grad.fill_(INF))
    assert_same(before, [p.detach() for p in model.parameters()])
    assert all((value == 0).all() for p in model.parameters() for value in optimizer.state[p].values())


def test_a_scaled_step_never_reads_a_value_of_its_scaler(monkeypatch):
    """What GradScaler asks for by the sum of its findings would wait for the device; GSO is handed the findings."""
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, backend="eager"), scaler_of()
    train(model, optimizer, [0], scaler)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()

    def refuse(self, *_):
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as m:
        for reading in ("item", "__bool__", "__float__", "tolist", "numpy"):
            m.setattr(torch.Tensor, reading, refuse)
        scaler.step(optimizer)
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


def test_the_cycle_of_blocks_does_not_turn_on_an_overflow():
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, schedule="cyclic", switch_every=1), scaler_of()
    train(model, optimizer, [0], scaler)
    before = snapshot(model, optimizer)
    train(model, optimizer, [1], scaler, lambda: model[0].bias.grad.fill_(INF))
    assert_same(before, snapshot(model, optimizer))


def test_float16_gradients_are_unscaled_in_float32():
    """Unscaled in float16, a gradient of 2^-30 would be 0."""
    weights = []
    for scale in (1.0, SCALE):
        p = nn.Parameter(torch.ones(2, 4, dtype=torch.float16))
        optimizer = gs.GSO([p], lr=0.25, budget=gs.Fixed(INF), weight_decay=0.0, eps=0.0)
        if scale > 1:
            p.grad = torch.full((2, 4), 2.0**-30 * scale, dtype=torch.float16)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
        else:
            p.grad = torch.full((2, 4), 2.0**-14, dtype=torch.float16)
        optimizer.step()
        weights.append(p.detach().clone())
    assert (weights[0] == 0.75).all()
    assert torch.equal(*weights)


def test_an_optimizer_inside_backward_refuses_a_scaler():
    model = model_of()
    optimizer, scaler = gs.GSO(model, lr=0.05, in_backward=True), scaler_of()
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"expected unscaled gradients, got a step\(\) by GradScaler"):
        scaler.step(optimizer)


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


@pytest.mark.parametrize("second_moment", ["element", "bin"])
def test_training_under_bfloat16_autocast_comes_close_to_float32(second_moment):
    losses = []
    for enabled in (False, True):
        model = model_of()
        optimizer = gs.GSO(model, lr=0.05, second_moment=second_moment)
        for step in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = loss_of(model, step)
            loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0] < 7
