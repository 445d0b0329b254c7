"""Text, detection and recurrence, shortened so that hundreds of runs fit; nothing explodes in any of them by itself.

Every method must be able to train them, or a fault would have nothing to destroy: the detector has the loss in
logarithms, the recurrent net short sequences. "sudden" stands for tasks that are solved at one stroke: there a delay of
a few steps multiplies the loss at which a run is cut off, so it is measured for the headline only. All learning rates
fall by a cosine to 1 %, so that the loss at the end is that of the run and not of its last batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsplit.lab.optimizers import Settings, make_optimizer
from gradsplit.lab.task import Task, evaluating
from gradsplit.lab.workloads.detection import build_detection
from gradsplit.lab.workloads.recurrence import build_adding, build_temporal_order
from gradsplit.lab.workloads.text import build_lstm

__all__ = ["WORKLOADS", "Shortened"]


@dataclass(frozen=True)
class Shortened:
    """A workload as the campaign trains it.

    Attributes:
        name: the name in the raw file.
        about: model and data in one line.
        build: seed -> task.
        settings: steps, optimizer, schedule.
        lr: learning rate at the start.
        held_out: the loss on data that is not trained on, weights as they are.
    """

    name: str
    about: str
    build: Callable[[int], Task]
    settings: Settings
    lr: float
    held_out: Callable[[Task], float]

    def optimizer(self, task: Task) -> torch.optim.Optimizer:
        """The optimizer of this workload over the task's model."""
        return make_optimizer(self.settings.optimizer, task.model, self.lr, self.settings)


def _text(task: Task) -> float:
    return task.evaluate(task.model)["val_loss"]


def _detection(task: Task) -> float:
    scenes = task.test_scenes  # type: ignore[attr-defined]
    return _loss(task, (scenes.images, scenes.boxes, scenes.labels))


def _recurrence(task: Task) -> float:
    return _loss(task, task.test())  # type: ignore[attr-defined]


def _loss(task: Task, batch: tuple[Tensor, ...]) -> float:
    with evaluating(task.model):
        return float(task.loss(task.model, batch))


WORKLOADS: dict[str, Shortened] = {
    row.name: row
    for row in (
        Shortened(
            "text",
            "character LSTM, width 64, windows of 32, 16 a step; AdamW, lr 3e-3, 500 steps",
            lambda seed: build_lstm(seed, width=64, context=32, batch=16),
            Settings(steps=500, optimizer="adamw", schedule="cosine"),
            3e-3,
            _text,
        ),
        Shortened(
            "detection",
            "two-tower detector, width 8, loss in logarithms, 16 scenes a step; SGD, momentum .9, lr .03, 500 steps",
            lambda seed: build_detection(seed, healthy=True, width=8, batch=16),
            Settings(steps=500, optimizer="sgdm", schedule="cosine"),
            0.03,
            _detection,
        ),
        Shortened(
            "recurrence",
            "tanh RNN, 50 units, adds two of 10 numbers, 50 sequences a step; Adam, lr 1e-3, 500 steps",
            lambda seed: build_adding(seed, length=10, init="basic_tanh", batch=50),
            Settings(steps=500, optimizer="adam", schedule="cosine"),
            1e-3,
            _recurrence,
        ),
        Shortened(
            "sudden",
            "tanh RNN, 50 units, temporal order over 20 steps, 20 sequences a step; Adam, lr 1e-3, 500 steps",
            lambda seed: build_temporal_order(seed, length=20, init="basic_tanh", batch=20),
            Settings(steps=500, optimizer="adam", schedule="cosine"),
            1e-3,
            _recurrence,
        ),
    )
}
