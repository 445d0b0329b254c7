"""SampleWatch: planted samples are named, others are not, and what is kept stays small."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradsplit.sources import SampleWatch, observe, standing
from gradsplit.sources.standing import Seen, standing_out

STEPS, SIZE = 16, 16


def _regression():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def _pictures():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))


def _rows():
    x = torch.randn(SIZE, 8)
    return x, 2 * x[:, :1]


def _images():
    target = torch.randint(5, (SIZE,))
    return torch.randn(SIZE, 1, 8, 8) + target[:, None, None, None], target


def _loss(output, target):
    return F.cross_entropy(output, target) if output.shape != target.shape else (output - target).square().mean()


def _read(make, batch, spoil, seed):
    """Train, spoil the last batch, and return what was read of its step."""
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with SampleWatch(model) as watch:
        for step in range(STEPS):
            x, target = batch()
            if step == STEPS - 1:
                spoil(x, target)
            optimizer.zero_grad()
            _loss(model(x), target).backward()
            watch.seal(0, step)
            optimizer.step()
    return watch.read(0, STEPS - 1)


def _nan(x, target, i):
    x[i].view(-1)[3] = math.nan


def _large(x, target, i):
    x[i] *= 1e4


def _label(x, target, i):
    target[i] += 1e3


@pytest.mark.parametrize(
    ("make", "batch", "fault", "num"),
    [
        (_regression, _rows, _nan, 1),
        (_regression, _rows, _large, 1),
        (_regression, _rows, _large, 2),
        (_regression, _rows, _label, 1),
        (_pictures, _images, _nan, 2),
    ],
    ids=["nan", "large", "two large", "label", "two nan before BatchNorm"],
)
def test_planted_samples_are_named_and_no_others(make, batch, fault, num):
    """Precision and recall of at least .95 over 20 seeds."""
    right = named = planted = 0
    for seed in range(20):
        chosen = set(torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))[:num].tolist())

        def spoil(x, target, chosen=chosen):
            for i in chosen:
                fault(x, target, i)

        found = {row.sample for row in _read(make, batch, spoil, seed).rows}
        right, named, planted = right + len(found & chosen), named + len(found), planted + num
    assert right >= 0.95 * named
    assert right >= 0.95 * planted


@pytest.mark.parametrize("times", [1.0, 1e3], ids=["healthy", "whole"])
@pytest.mark.parametrize(("make", "batch"), [(_regression, _rows), (_pictures, _images)])
def test_a_healthy_batch_and_one_scaled_as_a_whole_name_hardly_anybody(make, batch, times):
    readings = [_read(make, batch, lambda x, target: x.mul_(times), seed) for seed in range(20)]
    assert sum(bool(reading.rows) for reading in readings) <= 1
    assert {reading.why for reading in readings if not reading.rows} == {"none" if times == 1 else "whole"}


def test_the_norms_are_those_of_the_formula():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, d = torch.randn(5, 3), torch.randn(5, 2)
    with SampleWatch(model) as watch:
        model(x).backward(d)
    (entry,) = watch._passes[-1].entries
    torch.testing.assert_close(entry.activation_S, x.double().norm(dim=1).float())
    torch.testing.assert_close(entry.signal_S, d.double().norm(dim=1).float())


def _seen(norms, layer="a", place=0):
    return Seen(layer, place, None, np.asarray(norms, dtype=float))


def test_the_measure_is_the_batch_and_those_before():
    usual = [[_seen(np.linspace(1, 2, 8))] for _ in range(6)]
    large = np.linspace(1, 2, 8)
    large[2] = 50
    (row,) = standing_out(usual, [[_seen(large)]], ()).rows
    assert (row.sample, row.layer) == (2, "a") and row.ratio == pytest.approx(50 / (1 + 6 / 7))  # the sixth of eight
    assert standing_out(usual, [[_seen(50 * np.linspace(1, 2, 8))]], ()).why == "none"
    assert not standing_out([[_seen(100 * large)] for _ in range(6)], [[_seen(large)]], ()).rows


def _given(inputs, norms=None):
    inputs = np.asarray(inputs, dtype=float)
    return [Seen("a", 0, inputs, (np.ones(len(inputs)) if norms is None else norms) / inputs)]


def test_an_input_far_beyond_its_batch_stands_out_where_no_gradient_does():
    usual = [_given(np.linspace(1, 2, 8)) for _ in range(6)]
    large = np.linspace(1, 2, 8)
    large[2] = 1e4
    reading = standing_out(usual, [_given(large)], ())
    (row,) = reading.rows
    assert reading.by == "input" and (row.sample, row.layer) == (2, "a")
    assert row.ratio == pytest.approx(1e4 / (1 + 6 / 7))
    assert standing_out([], [_given(large)], ()).by == "input", "the first batch"
    large[2] = 90 * (1 + 6 / 7)
    assert standing_out(usual, [_given(large)], ()).why == "none", "below a hundred times"


@pytest.mark.parametrize(
    "inputs",
    [
        [1.0] * 5 + [1e4] * 3,  # more than a quarter of the batch
        [0.0] * 7 + [1.0],  # nothing to compare with
        [1e-30] + [1.0] * 7,
    ],
)
def test_inputs_of_a_usual_kind_do_not_stand_out(inputs):
    inputs = np.asarray(inputs)
    assert not standing._far([Seen("a", 0, inputs, np.ones(8))], [])


def test_data_with_heavy_tails_accuse_nobody():
    """Where every second batch has such a sample it is usual."""
    batches = [np.r_[np.linspace(1, 2, 7), 1e4 if t % 2 else 3.0] for t in range(20)]
    assert not standing_out([_given(batch) for batch in batches], [_given(batches[1])], ()).rows


def test_the_rows_with_an_input_far_beyond_its_batch_are_found_in_one_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with SampleWatch(model) as watch:
        watch.name(0, {id(parameter): name for name, parameter in model.named_parameters()})
        for row in range(12):
            x = torch.randn(9 if row < 6 else 16, 4)
            x[3] *= 1e4 if row in (4, 8) else 1.0
            x[0, 0] = math.nan if row == 10 else 0.0
            model(x).sum().backward()
            watch.seal(0, row)
    assert watch.far(0, range(12)) == {4, 8}
    assert watch.far(0, range(5, 8)) == set() == watch.far(1, range(12))


def test_the_first_lost_layer_of_the_forward_pass_counts():
    bad = np.array([1.0, math.nan, 1.0])
    layers = [
        Seen("a", 0, np.ones(3), np.full(3, math.nan)),
        Seen("b", 1, bad, np.full(3, math.nan)),
        Seen("c", 2, np.full(3, math.nan), np.full(3, math.nan)),
    ]
    (row,) = standing_out([], [layers], ()).rows
    assert (row.sample, row.layer) == (1, "b") and math.isnan(row.ratio)
    assert standing_out([], [layers[2:]], ()).why == "all"


def test_a_signal_that_is_lost_in_the_backward_pass_is_named_where_it_was_lost():
    lost = np.array([1.0, 1.0, math.inf])
    layers = [Seen("a", 0, np.ones(3), lost), Seen("b", 1, np.ones(3), lost), Seen("c", 2, np.ones(3), np.ones(3))]
    (row,) = standing_out([], [layers], ()).rows
    assert (row.sample, row.layer) == (2, "b")


def test_layers_of_another_number_of_samples_are_left_out():
    layers = [_seen(np.ones(4), "a"), _seen(np.ones(4), "b", 1), _seen(np.r_[np.ones(11), 1e6], "tokens", 2)]
    reading = standing_out([], [layers], ())
    assert reading.batch == 4 and not reading.rows


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(observe, "MOST_BYTES", 4000)
    model = nn.Linear(2, 1)
    with SampleWatch(model) as watch:
        for row in range(60):
            model(torch.ones(50, 2)).sum().backward()
            watch.seal(0, row)
    assert len(watch._passes) <= 13
    assert watch.read(0, 0).why == "gone" and watch.read(0, 59).why == "none"


def test_it_measures_nothing_without_gradients_nor_in_transformations():
    model = nn.Linear(2, 1)
    with SampleWatch(model) as watch:
        with torch.no_grad():
            model(torch.ones(3, 2))
        torch.func.vmap(model)(torch.ones(3, 2))
        y = model(torch.ones(3, 2, requires_grad=True))
        (g,) = torch.autograd.grad(y.sum(), list(model.parameters())[:1], create_graph=True)
        assert g.requires_grad
    assert not watch._passes and not watch.failed


def test_its_own_failure_ends_the_watching_and_not_the_training(monkeypatch):
    model = nn.Linear(2, 1)

    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(observe, "length", broken)
    with SampleWatch(model) as watch:
        model(torch.ones(3, 2)).sum().backward()
    assert "broken" in watch.failed and model.weight.grad is not None


@pytest.mark.parametrize(("model", "options"), [("net", {}), (None, {"batch_dim": -1}), (None, {"batch_dim": "0"})])
def test_bad_arguments_are_named(model, options):
    with pytest.raises(ValueError, match=r"SampleWatch\(.*expected"):
        SampleWatch(model, **options)


def test_torch_warns_of_other_hooks_still(recwarn):
    """Ours is no reason to warn of hooks when a compiled model runs; another one is."""
    compiled = torch.compile(nn.Linear(2, 1), backend="eager")
    with SampleWatch():
        compiled(torch.ones(3, 2))
        assert not [one for one in recwarn if "global hooks" in str(one.message)]
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            with pytest.warns(UserWarning, match="global hooks"):
                compiled(torch.ones(3, 2))
        finally:
            handle.remove()
