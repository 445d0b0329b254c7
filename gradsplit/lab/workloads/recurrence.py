"""Recurrent tasks whose gradient passes through every time step: temporal order, adding.

Batch of "temporal-order": (sequences (batch, time, 6) one-hot float32, classes (batch,) int64); of "adding":
(sequences (batch, time, 2) float32, sums (batch,) float32).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import BATCHES, DATA, Batch, Task, Workload, evaluating, generator, measured, reject_unknown, seeded

INITS = ("smart_tanh", "basic_tanh")
NUM_TEST = 2000
SOLVED_ERROR = 0.01  # both tasks: the share of wrong sequences below which the papers call a task solved
ADDING_TOLERANCE = 0.04  # a sum is right within this distance (Hochreiter and Schmidhuber 1997)
SYMBOLS, DISTRACTORS, CLASSES = 6, 4, 4


class TanhRNN(nn.Module):
    """h_t = tanh(W_in x_t + W_rec h_{t-1} + b), logits from the last h; unrolled, so every step is a joint.

    "smart_tanh" (Pascanu et al. 2013): recurrent weights N(0, 0.01^2) with 15 non-zeros per row, scaled to a
    spectral radius of 0.95; the others N(0, 0.01^2). "basic_tanh": all N(0, 0.1^2). Biases start at zero.

    Args:
        inputs: numbers a time step.
        hidden: units.
        outputs: logits.
        init: "smart_tanh" or "basic_tanh".
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, init: str) -> None:
        super().__init__()
        reject_unknown("TanhRNN", "init", init, INITS)
        std = 0.01 if init == "smart_tanh" else 0.1
        self.w_in = nn.Parameter(torch.randn(hidden, inputs) * std)
        recurrent = torch.randn(hidden, hidden) * std
        if init == "smart_tanh":
            order = torch.rand(hidden, hidden).argsort(dim=1)
            recurrent = recurrent * (order < 15)
            radius = torch.linalg.eigvals(recurrent.double()).abs().max()
            recurrent = (recurrent.double() * (0.95 / radius)).float()
        self.w_rec = nn.Parameter(recurrent)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.head = nn.Linear(hidden, outputs)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (batch, outputs) of sequences (batch, time, inputs)."""
        driven = F.linear(x, self.w_in, self.bias).unbind(1)
        h = torch.zeros_like(driven[0])
        for step in driven:
            h = torch.tanh(step + F.linear(h, self.w_rec))
        return self.head(h)


class SequenceTask(Task):
    """Fresh sequences at every step; errors on a fixed set of 2,000."""

    def __init__(self, model: nn.Module, seed: int, *, length: int, batch: int) -> None:
        super().__init__(model, seed)
        self.length, self.batch_size = length, batch

    @abstractmethod
    def sequences(self, count: int, draw: torch.Generator) -> Batch:
        """`count` sequences with their targets."""

    def draw(self, step: int) -> Batch:
        """Fresh sequences of `step`."""
        return self.sequences(self.batch_size, generator(self.seed, BATCHES, step))

    def test(self) -> Batch:
        """The sequences that every seed is tested on."""
        inputs, targets = self.sequences(NUM_TEST, generator(0, DATA, self.length))
        return inputs.to(self.device), targets.to(self.device)


class TemporalOrder(SequenceTask):
    """Name the order of two informative symbols that lie far back among distractors.

    One of two informative symbols stands at a random place in [L/10, 2L/10), one in [5L/10, 6L/10); four
    symbols distract elsewhere. The class is the ordered pair. (As in the authors' code; its docstring gives
    [1, L/10) for the first place.)
    """

    def sequences(self, count: int, draw: torch.Generator) -> Batch:
        """One-hot sequences (count, L, 6) and classes (count,)."""
        tenth = self.length // 10
        ids = torch.randint(DISTRACTORS, (count, self.length), generator=draw) + 2
        first = tenth + torch.randint(tenth, (count, 1), generator=draw)
        second = 5 * tenth + torch.randint(tenth, (count, 1), generator=draw)
        pair = torch.randint(2, (count, 2), generator=draw)
        ids = ids.scatter(1, first, pair[:, :1]).scatter(1, second, pair[:, 1:])
        return F.one_hot(ids, SYMBOLS).float(), 2 * pair[:, 0] + pair[:, 1]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy at the last step, nats."""
        sequences, classes = batch
        return F.cross_entropy(model(sequences), classes)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Give "error", the share of wrong classes (chance .75), and "solved", 1 below 1 %."""
        sequences, classes = self.test()
        with evaluating(model):
            logits = model(sequences)
        wrong = (logits.argmax(-1) != classes) | ~logits.isfinite().all(-1)
        error = float(wrong.float().mean())
        return {"error": error, "solved": float(error < SOLVED_ERROR)}


class Adding(SequenceTask):
    """Sum of two marked numbers, the first mark in the first tenth, the second in the first half behind it.

    Numbers are uniform in [0, 1]; the target is the mean of the marked two, so that it lies in [0, 1].
    """

    def sequences(self, count: int, draw: torch.Generator) -> Batch:
        """Numbers and marks (count, L, 2), and half sums (count,)."""
        numbers = torch.rand(count, self.length, generator=draw)
        tenth, half = self.length // 10, self.length // 2
        first = torch.randint(tenth, (count, 1), generator=draw)
        second = tenth + torch.randint(half - tenth, (count, 1), generator=draw)
        marks = torch.zeros_like(numbers).scatter(1, first, 1.0).scatter(1, second, 1.0)
        return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(1) / 2

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error at the last step."""
        sequences, sums = batch
        return F.mse_loss(model(sequences)[:, 0], sums)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Give "error", the share of sums off by 0.04 or more, "mse", and "solved", 1 below 1 %."""
        sequences, sums = self.test()
        with evaluating(model):
            distance = (model(sequences)[:, 0] - sums).abs()
        error = float((~(distance < ADDING_TOLERANCE)).float().mean())
        return {"error": error, "mse": float(distance.square().mean()), "solved": float(error < SOLVED_ERROR)}


def _reject_short(call: str, length: int) -> None:
    if length < 10:
        raise ValueError(f"{call}(length={length}): expected at least 10, for tenths of a sequence. Enlarge it.")


def build_temporal_order(
    seed: int = 0, *, length: int = 50, hidden: int = 50, init: str = "smart_tanh", batch: int = 20
) -> TemporalOrder:
    """The temporal-order task; see `TEMPORAL_ORDER.options`.

    Raises:
        ValueError: a length below 10, or an unknown initialisation.
    """
    _reject_short("build_temporal_order", length)
    with seeded(seed):
        model = TanhRNN(SYMBOLS, hidden, CLASSES, init)
    return TemporalOrder(model, seed, length=length, batch=batch)


def build_adding(
    seed: int = 0, *, length: int = 50, hidden: int = 50, init: str = "smart_tanh", batch: int = 20
) -> Adding:
    """The adding task; see `ADDING.options`.

    Raises:
        ValueError: a length below 10, or an unknown initialisation.
    """
    _reject_short("build_adding", length)
    with seeded(seed):
        model = TanhRNN(2, hidden, 1, init)
    return Adding(model, seed, length=length, batch=batch)


_OPTIONS = {
    "length": "time steps, at least 10",
    "hidden": "tanh units",
    "init": '"smart_tanh" (sparse, spectral radius 0.95) or "basic_tanh"',
    "batch": "sequences a step",
}

TEMPORAL_ORDER = Workload(
    name="temporal-order",
    title="tanh RNN names the order of two symbols 50 steps long",
    metric="error",
    higher_is_better=False,
    steps=6000,
    optimizer="sgd",
    lr=0.01,
    expected=measured(0.607, 39, "gradsplit compare temporal-order --methods clip --strengths 1 --lr 0.01 --seeds 1"),
    data_note="Synthetic by definition: the temporal-order task of Pascanu, Mikolov and Bengio 2013.",
    build=build_temporal_order,
    options=_OPTIONS,
)

ADDING = Workload(
    name="adding",
    title="tanh RNN adds two marked numbers of 50",
    metric="error",
    higher_is_better=False,
    steps=6000,
    optimizer="sgd",
    lr=0.01,
    expected=measured(0.847, 39, "gradsplit compare adding --methods clip --strengths 1 --lr 0.01 --seeds 1"),
    data_note="Synthetic by definition: the adding task of Hochreiter and Schmidhuber 1997.",
    build=build_adding,
    options=_OPTIONS,
)
