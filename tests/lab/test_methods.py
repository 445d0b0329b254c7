"""Every method trains; those with a formula do what it says; all get the same number of strengths."""

from __future__ import annotations

import importlib

import pytest
import torch

import gradsplit as gs
from gradsplit.lab.controls import GlobalClip, Split, Tally, tree_limits
from gradsplit.lab.methods import METHODS, arrange, method_named
from gradsplit.lab.optimizers import OPTIMIZERS, MuonWithAdamW, Settings, rate_factor, state_per_weight
from gradsplit.lab.task import MissingDataError
from gradsplit.lab.workloads.stacks import build_residual_stack


def _task(seed=0):
    return build_residual_stack(seed=seed, blocks=2, channels=3, batch=4)


def _strength(name):
    return METHODS[name].strengths[3] if METHODS[name].strengths else None


def _backward(task, step=0):
    task.model.zero_grad()
    task.loss(task.model, task.batch(step)).backward()


def _copy(task):
    return {name: p.detach().double().clone() for name, p in task.model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgdm", "adamw"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_every_optimizer(name, optimizer):
    task = _task()
    before = _copy(task)
    arrangement = arrange(METHODS[name], task, 1e-3, _strength(name), Settings(3, optimizer, schedule="cosine"))
    arrangement.mode(training=True)
    for step in range(3):
        _backward(task, step)
        arrangement.update()
    after = _copy(task)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tally = arrangement.control.tally
    assert tally is None or (tally.steps == 3 and 0 <= tally.scaled_share <= 1)


def test_tuned_methods_have_seven_ascending_strengths_and_the_others_none():
    lengths = {name: len(row.strengths) for name, row in METHODS.items()}
    assert set(lengths.values()) == {0, 7}
    assert all(list(row.strengths) == sorted(set(row.strengths)) for row in METHODS.values())
    assert [name for name in ("none", "default", "gso", "prodigy", "schedulefree") if lengths[name]] == []


def test_registered_names_are_the_rows_own_and_name_known_optimizers():
    for name, row in METHODS.items():
        assert row.name == name and row.summary
        for asked in ("sgdm", "adamw"):
            assert row.optimizer_name(asked) in OPTIMIZERS


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_moves_a_convolution_as_torchs_muon_moves_its_matrix_and_the_rest_as_adamw(scale):
    ours, theirs = _task(), _task()
    settings = Settings(4, "adamw")
    optimizer = MuonWithAdamW(ours.model, 0.02, settings, adam=0.5, scale=scale)
    named = dict(theirs.model.named_parameters())
    hidden = {name: p for name, p in named.items() if p.ndim > 1 and not name.startswith("head")}
    flat = {name: torch.nn.Parameter(p.detach().flatten(1).clone()) for name, p in hidden.items()}
    muon = torch.optim.Muon(flat.values(), lr=0.02, weight_decay=0.01, momentum=0.95, adjust_lr_fn=scale)
    adamw = torch.optim.AdamW([p for name, p in named.items() if name not in hidden], lr=0.01, betas=(0.9, 0.99))
    for step in range(2):
        _backward(ours, step)
        optimizer.step()
        _backward(theirs, step)
        for name, p in flat.items():
            p.grad = named[name].grad.flatten(1)
        muon.step()
        adamw.step()
        with torch.no_grad():
            for name, p in flat.items():
                named[name].copy_(p.view_as(named[name]))
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-6, atol=1e-7)
    assert any(p.ndim == 4 for p in hidden.values())
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.model.parameters())


def test_a_schedule_moves_both_parts_of_muon():
    arrangement = arrange(METHODS["muon"], _task(), 0.03, None, Settings(4, "adamw", schedule="linear", warmup=0))
    for step in range(2):
        _backward(arrangement_task := _task(), step)
        del arrangement_task
        arrangement.schedule.optimizer.step()
        arrangement.schedule.step()
    assert [group["lr"] for part in arrangement.optimizer._parts for group in part.param_groups] == pytest.approx(
        [0.015, 0.005]
    )


def test_memory_is_counted_in_copies_of_the_weights():
    def held(name, lr):
        task = _task()
        arrangement = arrange(METHODS[name], task, lr, _strength(name), Settings(2, "sgdm"))
        arrangement.mode(training=True)
        _backward(task)
        arrangement.update()
        return state_per_weight(arrangement.optimizer, task.model)

    assert held("none", 0.01) == 1.0
    assert held("adamw", 1e-3) == pytest.approx(2.0, abs=0.2)
    assert held("lion", 1e-4) == pytest.approx(1.0, abs=0.01)
    assert 1.0 < held("muon", 0.02) < 2.0


def test_the_global_clip_is_torchs():
    ours, theirs = _task(), _task()
    for task in (ours, theirs):
        _backward(task)
    GlobalClip(ours, 0.3).bound()
    torch.nn.utils.clip_grad_norm_(list(theirs.model.parameters()), 0.3)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_clip_that_met_nan_is_counted_as_not_finite():
    task = _task()
    _backward(task)
    task.model.head.weight.grad[0, 0] = float("nan")
    control = GlobalClip(task, 0.3)
    control.bound()
    assert (control.tally.zeroed_share, control.tally.scaled_share) == (1.0, 0.0)


def test_rows_relative_to_their_weights_are_adaptive_gradient_clipping():
    task = _task()
    arrangement = arrange(METHODS["xsp"], task, 0.1, 0.04, Settings(1, "sgdm"))
    _backward(task)
    before = {name: p.grad.double().clone() for name, p in task.model.named_parameters()}
    arrangement.control.bound()
    for name, p in task.model.named_parameters():
        g, w = before[name], p.detach().double()
        if g.ndim > 1:
            g, w = g.flatten(1), w.flatten(1)
        limit = 0.04 * w.norm(dim=-1, keepdim=True).clamp(min=1e-3)
        expected = g * (limit / g.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        torch.testing.assert_close(p.grad.double().view_as(expected), expected, rtol=1e-5, atol=1e-12)


def test_the_default_in_adams_place_moves_no_row_by_more_than_its_share():
    task = _task()
    before = _copy(task)
    arrangement = arrange(METHODS["default"], task, 1.0, None, Settings(1, "adamw", weight_decay=0.0))
    assert isinstance(arrangement.optimizer, gs.GSO)
    _backward(task)
    arrangement.update()
    for name, p in task.model.named_parameters():
        old = before[name].flatten(1) if p.ndim > 1 else before[name][None]
        new = p.detach().double().view_as(old)
        allowed = 0.03 * torch.maximum(old.norm(dim=1), torch.tensor(0.01 * old.shape[1] ** 0.5).double())
        assert ((new - old).norm(dim=1) <= allowed * (1 + 1e-4)).all()


def test_a_limit_of_the_tree_can_bind_at_every_level():
    """An idle limit makes the splitter warn, and warnings are errors here."""
    plan = gs.tree_sp(gs.layout_of(_task().model))
    limits = tree_limits(plan, 0.5)
    assert limits["root"].limit == 0.5 and limits["tensor"].limit == 1.0
    assert all(0.5 < limit < 1.0 for limit in limits["module"].limit)
    task = _task()
    Split(task, torch.optim.SGD(task.model.parameters(), lr=0.1), "tree_sp", lambda plan: tree_limits(plan, 0.5), 1)


def test_a_tree_without_modules_has_limits_at_two_levels():
    plan = gs.tree_sp(gs.Layout.from_shapes({"w": (2, 3), "b": (2,)}))
    assert sorted(tree_limits(plan, 1.0)) == ["root", "tensor"]


@pytest.mark.parametrize(("name", "first"), [("adamw+clip+warmup", 0.25), ("adamw", 1.0), ("gso", 1.0), ("clip", 1.0)])
def test_only_methods_that_warm_up_do(name, first):
    settings = Settings(40, "sgdm", schedule="cosine", warmup=4)
    arrangement = arrange(METHODS[name], _task(), 0.01, _strength(name), settings)
    assert arrangement.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * first)


def test_a_schedule_ends_at_a_hundredth():
    factors = [rate_factor(step, 40, "cosine", 4) for step in range(41)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[40] == pytest.approx(0.01)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert {rate_factor(step, 40, "constant", 0) for step in range(40)} == {1.0}


def test_a_strength_where_none_belongs_and_none_where_one_does():
    with pytest.raises(ValueError, match=r"arrange\('clip', strength=None\): expected a strength, for example 0.3"):
        arrange(METHODS["clip"], _task(), 0.1, None, Settings(1))
    with pytest.raises(ValueError, match=r"arrange\('gso', strength=1.0\): expected no strength"):
        arrange(METHODS["gso"], _task(), 0.1, 1.0, Settings(1))


def test_an_unknown_method_is_named_beside_the_nearest():
    with pytest.raises(ValueError, match=r"method 'clipp': expected one of none, clip.* Did you mean 'clip'\?"):
        method_named("clipp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"Settings\(steps=0\): expected at least one step"),
        ({"steps": 5, "optimizer": "rms"}, r"Settings\(optimizer='rms'\): expected one of 'sgd'"),
        ({"steps": 5, "schedule": "step"}, r"Settings\(schedule='step'\): expected one of 'constant', 'cosine'"),
        ({"steps": 5, "warmup": 5}, r"Settings\(warmup=5\): expected 0 <= warmup < steps, here 5"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_a_method_of_a_package_that_is_absent_says_what_to_install(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDataError, match="Run: pip install pytorch-optimizer, or leave the method out"):
        arrange(METHODS["lamb"], _task(), 0.1, None, Settings(1))


def test_the_tally_counts_shares_and_names_the_worst():
    tally = Tally(3, lambda b: "abc"[b])
    tally.add(torch.tensor([1.0, 0.1, 0.5]), torch.tensor([True, True, True]))
    tally.add(torch.tensor([1.0, 0.1, 0.0]), torch.tensor([True, True, False]))
    assert tally.scaled_share == pytest.approx(3 / 6)
    assert tally.zeroed_share == pytest.approx(1 / 6)
    assert [name for name, _ in tally.worst()] == ["c", "b"]
    assert dict(tally.worst())["b"] == pytest.approx(0.1)
