"""Under Accelerate gradients are bounded on the steps that synchronise them, and states are saved with the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

import gradsplit as gs
from gradsplit.integrations.accelerate import split_gradients
from tests.integrations.loops import HISTORY, assert_same_weights, different_weights, error, model_of, rows_of, train


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def prepared(make_optimizer=sgd, accumulate=1, **options):
    """An accelerator with a prepared model, optimizer and loader of 24 rows."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
    model = model_of()
    loader = DataLoader(TensorDataset(*rows_of(24)), batch_size=2)
    return accelerator, *accelerator.prepare(model, make_optimizer(model), loader)


def passes(accelerator, model, optimizer, loader):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(error(model, *batch))
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_acts_once_a_real_step_and_trains_as_the_loop(accumulate):
    accelerator, model, optimizer, loader = prepared(accumulate=accumulate)
    splitter = split_gradients(accelerator, model, optimizer, **HISTORY)
    passes(accelerator, model, optimizer, loader)
    alone = model_of()
    train(alone, sgd(alone), rows=24, batch=2, accumulate=accumulate, splitter=gs.GradientSplitter(alone, **HISTORY))
    assert_same_weights(model, alone)
    assert splitter.step_count == 12 // accumulate
    assert splitter.layout.names == ("0.weight", "0.bias", "2.weight")


def test_it_trains_as_the_loop_under_bfloat16():
    """Accelerate keeps one precision a process until its state is reset."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model, optimizer, loader = prepared(mixed_precision="bf16")
    split_gradients(accelerator, model, optimizer, **HISTORY)
    passes(accelerator, model, optimizer, loader)
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = model_of()
    train(alone, sgd(alone), rows=24, batch=2, splitter=gs.GradientSplitter(alone, **HISTORY), bfloat16=True)
    assert_same_weights(accelerator.unwrap_model(model), alone)


def test_gso_is_an_optimizer_like_others():
    run = prepared(lambda model: gs.GSO(model, lr=1e-2, direction="adam"), accumulate=3)
    passes(*run)
    alone = model_of()
    train(alone, gs.GSO(alone, lr=1e-2, direction="adam"), rows=24, batch=2, accumulate=3)
    assert_same_weights(run[1], alone)


def test_the_default_budget_follows_a_prepared_scheduler():
    accelerator, model, optimizer, loader = prepared()
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    splitter = split_gradients(accelerator, model, optimizer)
    passes(accelerator, model, optimizer, loader)
    scheduler.step()
    assert splitter._split.pace_B().tolist() == [0.5] * splitter.plan.num_bins


def gso(model):
    return gs.GSO(model, lr=1e-2, budget=HISTORY["budget"], direction="adam")


def begun(make_optimizer, path=None):
    """A run of 12 steps, from a saved state if there is one; and its splitter if the optimizer needs it."""
    run = prepared(make_optimizer)
    splitter = split_gradients(*run[:3], **HISTORY) if make_optimizer is sgd else None
    if path is not None:
        run[0].load_state(path)
    return run, splitter


@pytest.mark.parametrize("make_optimizer", [sgd, gso])
def test_save_state_and_load_state_carry_the_history(tmp_path, make_optimizer):
    whole, _ = begun(make_optimizer)
    passes(*whole)
    whole[0].save_state(tmp_path / "half")
    passes(*whole)
    resumed, _ = begun(make_optimizer, tmp_path / "half")
    passes(*resumed)
    assert_same_weights(resumed[1], whole[1])


def test_without_the_saved_history_the_numbers_would_differ(tmp_path):
    whole, splitter = begun(sgd)
    nothing = copy.deepcopy(splitter.state_dict())
    passes(*whole)
    whole[0].save_state(tmp_path / "half")
    passes(*whole)
    forgetful, splitter = begun(sgd, tmp_path / "half")
    splitter.load_state_dict(nothing)
    passes(*forgetful)
    assert different_weights(forgetful[1], whole[1])


def test_updates_are_capped_behind_adam():
    accelerator, model, optimizer, loader = prepared(lambda model: torch.optim.Adam(model.parameters(), 0.5), 12)
    split_gradients(accelerator, model, optimizer, cap_updates=True)
    passes(accelerator, model, optimizer, loader)
    start = model_of()[0].weight
    moved = (model[0].weight - start).norm(dim=1)
    assert (moved <= 0.03 * start.norm(dim=1) * (1 + 1e-5)).all()
    assert (moved > 0).all()


def test_an_optimizer_that_was_not_prepared_is_refused():
    accelerator, model, optimizer, _ = prepared()
    with pytest.raises(TypeError, match=r"split_gradients\(optimizer=SGD\): expected what accelerator\.prepare"):
        split_gradients(accelerator, model, optimizer.optimizer)
    assert not optimizer.optimizer._optimizer_step_pre_hooks
