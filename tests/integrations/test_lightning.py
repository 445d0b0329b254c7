"""The Lightning callback gives the numbers of the hand-written loop, stops and goes on, and refuses a second clip."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import gradsplit as gs
from gradsplit.integrations.lightning import GradientSplitting
from tests.integrations.loops import (
    HISTORY,
    assert_same_weights,
    different_weights,
    error,
    model_of,
    rows_of,
    train,
)

pytestmark = [
    # Lightning 2.6 on torch 2.13: a class of torch's trees that Lightning still calls by its old name.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    # Lightning's advice on data loading, which a data set of 24 rows does not need.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]


class Net(pl.LightningModule):
    """The model of `loops` with an optimizer that a test chooses."""

    def __init__(self, make_optimizer) -> None:
        super().__init__()
        self.net, self.make_optimizer = model_of(), make_optimizer

    def training_step(self, batch, index):
        return error(self.net, *batch)

    def configure_optimizers(self):
        return self.make_optimizer(self)


class TwoOptimizers(Net):
    """Manual optimisation: a step of each layer's own optimizer, one after the other."""

    def __init__(self) -> None:
        super().__init__(lambda self: [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 2)])
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(error(self.net, *batch))
            optimizer.step()


def sgd(module):
    return torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)


def trainer_of(folder, *callbacks, epochs=1, **options):
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def loader(rows=24, batch=2):
    return DataLoader(TensorDataset(*rows_of(rows)), batch_size=batch)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_trains_as_the_loop_with_a_splitter_before_each_step(tmp_path, accumulate):
    net, callback = Net(sgd), GradientSplitting(**HISTORY)
    trainer_of(tmp_path, callback, accumulate_grad_batches=accumulate).fit(net, loader())
    alone = model_of()
    optimizer = sgd(alone)
    train(alone, optimizer, rows=24, batch=2, accumulate=accumulate, splitter=gs.GradientSplitter(alone, **HISTORY))
    assert_same_weights(net.net, alone)
    (splitter,) = callback.splitters
    assert splitter.step_count == 12 // accumulate
    assert splitter.layout.names == ("net.0.weight", "net.0.bias", "net.2.weight")


def test_it_trains_as_the_loop_under_bfloat16(tmp_path):
    net = Net(sgd)
    trainer_of(tmp_path, GradientSplitting(**HISTORY), precision="bf16-mixed").fit(net, loader())
    alone = model_of()
    train(alone, sgd(alone), rows=24, batch=2, splitter=gs.GradientSplitter(alone, **HISTORY), bfloat16=True)
    assert_same_weights(net.net, alone)


def test_the_default_budget_reads_the_learning_rate_and_caps_updates_behind_adam(tmp_path):
    nets = [Net(sgd), Net(lambda module: torch.optim.Adam(module.parameters(), 0.5))]
    callbacks = [GradientSplitting(), GradientSplitting(cap_updates=True)]
    for net, callback in zip(nets, callbacks, strict=True):
        start = model_of()[0].weight.detach().clone()
        trainer_of(tmp_path, callback, limit_train_batches=1).fit(net, loader())
        moved = (net.net[0].weight - start).norm(dim=1)
        assert (moved <= 0.03 * start.norm(dim=1) * (1 + 1e-5)).all()
        assert (moved > 0).all()


def test_gso_is_an_optimizer_like_others(tmp_path):
    net = Net(lambda module: gs.GSO(module, lr=1e-2, direction="adam"))
    trainer_of(tmp_path).fit(net, loader())
    alone = model_of()
    train(alone, gs.GSO(alone, lr=1e-2, direction="adam"), rows=24, batch=2)
    assert_same_weights(net.net, alone)


def test_each_optimizer_has_a_splitter_of_its_own_under_manual_optimisation(tmp_path):
    net, callback = TwoOptimizers(), GradientSplitting("per_tensor", gs.Fixed(1e-3))
    trainer_of(tmp_path, callback).fit(net, loader())
    assert [s.layout.names for s in callback.splitters] == [("net.0.weight", "net.0.bias"), ("net.2.weight",)]
    assert [s.step_count for s in callback.splitters] == [12, 12]
    moved = (net.net[2].weight - model_of()[2].weight).norm()
    assert 0 < moved <= 12 * 0.1 * 1e-3 * (1 + 1e-5)


def test_a_checkpoint_carries_the_history_and_resuming_gives_the_same_numbers(tmp_path):
    whole = Net(sgd)
    trainer_of(tmp_path, GradientSplitting(**HISTORY), epochs=2).fit(whole, loader())
    first = trainer_of(tmp_path, GradientSplitting(**HISTORY))
    first.fit(Net(sgd), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, forgetful = Net(sgd), Net(sgd)
    trainer_of(tmp_path, GradientSplitting(**HISTORY), epochs=2).fit(
        resumed, loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert_same_weights(resumed, whole)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    saved["callbacks"].clear()
    torch.save(saved, tmp_path / "without.ckpt")
    trainer_of(tmp_path, GradientSplitting(**HISTORY), epochs=2).fit(
        forgetful, loader(), ckpt_path=tmp_path / "without.ckpt"
    )
    assert different_weights(forgetful, whole), "the history would not have mattered"


def test_a_checkpoint_of_another_number_of_optimizers_is_refused(tmp_path):
    callback = GradientSplitting(**HISTORY)
    callback.load_state_dict({"splitters": []})
    with pytest.raises(ValueError, match=r"expected the state of 1 optimizers, got 0\. Resume with the optimizers"):
        trainer_of(tmp_path, callback).fit(Net(sgd), loader())


def test_a_clip_of_the_trainer_is_refused_before_anything_moves(tmp_path):
    net = Net(sgd)
    with pytest.raises(ValueError, match=r"Trainer\(gradient_clip_val=0\.5\): expected no clip .* Leave gradient_clip"):
        trainer_of(tmp_path, GradientSplitting(**HISTORY), gradient_clip_val=0.5).fit(net, loader())
    assert_same_weights(net.net, model_of())


def test_nothing_stays_attached_after_training_or_after_an_error(tmp_path):
    held = []

    def keep(module):
        held.append(sgd(module))
        return held[-1]

    class Fails(Net):
        def training_step(self, batch, index):
            if index == 3:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, index)

    trainer_of(tmp_path, GradientSplitting(**HISTORY)).fit(Net(keep), loader())
    with pytest.raises(ArithmeticError):
        trainer_of(tmp_path, GradientSplitting(**HISTORY)).fit(Fails(keep), loader())
    assert [len(optimizer._optimizer_step_pre_hooks) for optimizer in held] == [0, 0]
