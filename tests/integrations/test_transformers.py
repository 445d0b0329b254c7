"""The Hugging Face callback gives the numbers of the hand-written loop, resumes to the bit, and refuses a clip."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

import gradsplit as gs
from gradsplit.integrations.transformers import GradientSplitting
from tests.integrations.loops import HISTORY, assert_same_weights, different_weights, error, model_of, rows_of, train

ROWS, BATCH, STEPS = 24, 2, 6


class Net(nn.Module):
    """The model of `loops` as Trainer wants it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model_of()

    def forward(self, inputs, targets):
        return {"loss": error(self.net, inputs, targets)}


class InOrder(Trainer):
    """Rows in their order, so that a loop can be written beside it."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})


def trainer_of(folder, model, *callbacks, optimizer=SGD, **options):
    x, y = rows_of(ROWS)
    settings = {
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2, "max_steps": STEPS, "max_grad_norm": 0,
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "average_tokens_across_devices": False,
    }  # fmt: skip
    trainer = InOrder(
        model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=[{"inputs": a, "targets": b} for a, b in zip(x, y, strict=True)],
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_it_trains_as_the_loop_with_a_splitter_before_each_step(tmp_path):
    net, callback = Net(), GradientSplitting(**HISTORY)
    trainer_of(tmp_path, net, callback).train()
    alone = model_of()
    optimizer = torch.optim.SGD(alone.parameters(), 0.05, momentum=0.9)
    train(alone, optimizer, rows=ROWS, batch=BATCH, accumulate=2, splitter=gs.GradientSplitter(alone, **HISTORY))
    assert_same_weights(net.net, alone)
    assert callback.splitter.step_count == STEPS, "once an update, not once a micro-batch"
    assert callback.splitter.layout.names == ("net.0.weight", "net.0.bias", "net.2.weight")


def test_it_trains_as_the_loop_under_bfloat16(tmp_path, monkeypatch):
    """Trainer writes its precision into the environment, and Accelerate keeps it: both are put back."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    net = Net()
    trainer_of(tmp_path, net, GradientSplitting(**HISTORY), bf16=True).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = model_of()
    optimizer = torch.optim.SGD(alone.parameters(), 0.05, momentum=0.9)
    train(
        alone,
        optimizer,
        rows=ROWS,
        batch=BATCH,
        accumulate=2,
        splitter=gs.GradientSplitter(alone, **HISTORY),
        bfloat16=True,
    )
    assert_same_weights(net.net, alone)


@pytest.mark.parametrize("budget", [HISTORY["budget"], gs.Relative(0.2)])
def test_resuming_from_a_checkpoint_gives_the_same_numbers(tmp_path, budget):
    whole = Net()
    trainer_of(tmp_path / "whole", whole, GradientSplitting(budget=budget)).train()
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path / "run", Net(), GradientSplitting(budget=budget), max_steps=3, **options).train()
    checkpoint = shutil.move(tmp_path / "run" / "checkpoint-3", tmp_path / "moved")
    resumed, callback = Net(), GradientSplitting(budget=budget)
    trainer_of(tmp_path / "run", resumed, callback).train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(resumed, whole)
    assert callback.splitter.step_count == STEPS


def test_without_the_saved_history_the_numbers_would_differ(tmp_path):
    whole, forgetful = Net(), Net()
    trainer_of(tmp_path, whole, GradientSplitting(**HISTORY), save_strategy="steps", save_steps=3).train()
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("GradientSplitting")["attributes"]["saved"]
    path.write_text(json.dumps(state))
    trainer_of(tmp_path, forgetful, GradientSplitting(**HISTORY)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert different_weights(forgetful, whole)


def test_training_twice_attaches_once(tmp_path):
    callback = GradientSplitting(**HISTORY)
    trainer = trainer_of(tmp_path, Net(), callback)
    trainer.train()
    trainer.train()
    assert callback.splitter.step_count == STEPS, "the second run has a splitter of its own"
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_run_that_failed_leaves_nothing_attached_in_the_next(tmp_path):
    """Trainer tells callbacks of no error: the next beginning takes off what is left."""

    class FailsOnce(Net):
        failed = False

        def forward(self, inputs, targets):
            if not self.failed:
                self.failed = True
                raise ArithmeticError("on purpose")
            return super().forward(inputs, targets)

    callback = GradientSplitting(**HISTORY)
    trainer = trainer_of(tmp_path, FailsOnce(), callback)
    with pytest.raises(ArithmeticError):
        trainer.train()
    trainer.train()
    assert callback.splitter.step_count == STEPS
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_updates_are_capped_behind_the_trainers_own_adamw(tmp_path):
    net, start = Net(), model_of()[0].weight.detach()
    callback = GradientSplitting(cap_updates=True)
    trainer_of(tmp_path, net, callback, optimizer=None, learning_rate=0.5, max_steps=1).train()
    moved = (net.net[0].weight - start).norm(dim=1)
    assert (moved <= 0.03 * start.norm(dim=1) * (1 + 1e-5)).all()
    assert (moved > 0).all()


def test_gso_is_an_optimizer_like_others_and_resumes(tmp_path):
    """Trainer's own two groups, the second without decay: the loop makes the same ones."""
    alone = model_of()
    decayed, rest = [alone[0].weight, alone[2].weight], [alone[0].bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    train(alone, gs.GSO(groups, lr=1e-2, direction="adam"), rows=ROWS, batch=BATCH, accumulate=2)
    options = {"optimizer": (gs.GSO, {"lr": 1e-2, "direction": "adam"}), "weight_decay": 0.1}
    whole, resumed = Net(), Net()
    trainer_of(tmp_path, whole, save_strategy="steps", save_steps=3, **options).train()
    assert_same_weights(whole.net, alone)
    trainer_of(tmp_path, resumed, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(resumed, whole)


def test_gso_knows_the_models_names_where_it_is_given_the_model(tmp_path):
    net = Net()
    trainer = trainer_of(tmp_path, net, optimizer=(gs.GSO, {"params": net, "lr": 1e-2, "direction": "adam"}))
    trainer.train()
    assert trainer.optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
    assert different_weights(net.net, model_of())


def test_a_clip_of_the_trainer_is_refused_before_anything_moves(tmp_path):
    net = Net()
    message = r"TrainingArguments\(max_grad_norm=1\.0\): expected no clip .* Set max_grad_norm=0; .*Fixed\(1\.0\)"
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, net, GradientSplitting(**HISTORY), max_grad_norm=1.0).train()
    assert_same_weights(net.net, model_of())


def test_a_restored_callback_is_refused_since_it_has_lost_its_plan(tmp_path):
    trainer = trainer_of(tmp_path, Net(), GradientSplitting(**HISTORY), restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="restored all the same"):
        trainer.train()


def test_relative_step_in_front_of_adamw_says_what_to_use(tmp_path):
    with pytest.raises(ValueError, match=r"cap_updates=True .*or gradsplit\.GSO instead of the optimizer"):
        trainer_of(tmp_path, Net(), GradientSplitting(budget="relative_step"), optimizer=None).train()
