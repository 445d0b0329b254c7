"""A run is reproducible, is stopped where it is lost, and leaves what table and page need."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradsplit.lab.optimizers import Settings
from gradsplit.lab.task import Task
from gradsplit.lab.train import READ_EVERY, smoothed, steps_to, train
from gradsplit.lab.workloads.stacks import build_residual_stack


class Line(Task):
    """Fit y = 2 x with one weight; batches listed in `poisoned` hold a NaN."""

    def __init__(self, poisoned=()):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 1.0)
        super().__init__(model, 0)
        self.poisoned = poisoned

    def draw(self, step):
        x = torch.tensor([[1.0], [-1.0]])
        return (x * float("nan") if step in self.poisoned else x, 2 * x)

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def evaluate(self, model):
        return {"error": abs(float(model.weight.detach()) - 2.0)}


def test_gradient_descent_on_a_line_is_the_closed_form():
    """w - 2 shrinks by 1 - 2 lr a step."""
    result = train(Line(), "none", lr=0.1, settings=Settings(7, "sgd"))
    assert result.losses == pytest.approx([(1 - 2 * 0.1) ** (2 * step) for step in range(7)], rel=1e-5)
    assert result.metrics["error"] == pytest.approx(0.8**7, rel=1e-5)
    assert not result.diverged and result.scaled_share is None and result.num_bins == 0


def test_a_lost_run_stops_early_and_says_so():
    result = train(Line(), "none", lr=30.0, settings=Settings(400, "sgd"))
    assert result.diverged
    assert len(result.losses) < 100
    assert result.losses[-1] > 1e6 or not math.isfinite(result.losses[-1])


def test_one_bad_batch_is_no_divergence_where_its_bin_is_zeroed():
    settings = Settings(40, "sgd")
    ours = train(Line(poisoned=(5,)), "xsp-fixed", lr=0.1, strength=1.0, settings=settings)
    assert not ours.diverged and ours.metrics["error"] < 0.01
    assert ours.zeroed_share == pytest.approx(1 / 40)
    alone = train(Line(poisoned=(5,)), "clip", lr=0.1, strength=1.0, settings=settings)
    assert alone.diverged and math.isnan(alone.metrics["error"])


def test_weights_that_end_not_finite_are_a_divergence_even_at_the_last_step():
    assert train(Line(poisoned=(3,)), "none", lr=0.1, settings=Settings(4, "sgd")).diverged


def test_the_same_seed_gives_the_same_run():
    tasks = [build_residual_stack(seed=seed, blocks=2, channels=3, batch=4) for seed in (0, 0, 1)]
    runs = [train(task, "xsp", lr=0.05, strength=0.04, settings=Settings(12)) for task in tasks]
    assert runs[0].losses == runs[1].losses and runs[0].metrics == runs[1].metrics
    assert runs[0].losses != runs[2].losses


def test_watching_changes_nothing_and_shows_every_node():
    def run(watch):
        task = build_residual_stack(seed=0, blocks=2, channels=3, batch=4, gain=3.0)
        return train(task, "xsp", lr=0.05, strength=0.0025, settings=Settings(6), watch=watch)

    plain, watched = run(False), run(True)
    assert plain.norms is None and plain.losses == watched.losses
    norms = watched.norms
    assert norms.names[0] == "all" and norms.levels[0] == "root"
    tensors = [name for name, level in zip(norms.names, norms.levels, strict=True) if level == "tensor"]
    assert tensors == [name for name, _ in build_residual_stack(seed=0, blocks=2, channels=3).model.named_parameters()]
    assert norms.steps == list(range(6)) and len(norms.before) == len(norms.after) == 6
    for before, after in zip(norms.before, norms.after, strict=True):
        inside = [n for n, level in zip(before, norms.levels, strict=True) if level == "tensor"]
        assert before[0] == pytest.approx(math.hypot(*inside), rel=1e-9)
        assert all(b <= a * (1 + 1e-6) for a, b in zip(before, after, strict=True))
        assert after[0] < before[0]


def test_schedule_free_is_scored_with_its_averaged_weights():
    """Its weights in training mode are not those it recommends; scoring them would be unfair to it."""
    task = build_residual_stack(seed=0, blocks=2, channels=3, batch=4)
    result = train(task, "schedulefree", lr=0.05, settings=Settings(8))
    assert result.metrics == task.evaluate(task.model)


def test_progress_is_told_every_few_steps_and_at_the_end():
    seen = []
    train(Line(), "none", lr=0.1, settings=Settings(READ_EVERY + 3, "sgd"), on_progress=lambda *at: seen.append(at))
    assert [step for step, _ in seen] == [READ_EVERY, READ_EVERY + 3]
    assert seen[0][1] == pytest.approx(0.64 ** (READ_EVERY - 1), rel=1e-4)


@pytest.mark.parametrize(
    ("losses", "target", "steps"),
    [
        ([3.0, 1.0, 1.0], 1.0, 3),
        ([3.0, 1.0, 1.0], 0.5, None),
        ([1.0], 2.0, 1),
        ([], 2.0, None),
        ([math.nan, 1.0], 1.0, None),
    ],
)
def test_steps_until_the_running_mean_is_down(losses, target, steps):
    assert steps_to(losses, target, window=2) == steps


def test_a_running_mean_over_more_than_there_is():
    assert smoothed([2.0, 4.0], window=25) == [3.0]
    assert smoothed([], window=25) == []
