"""What a workload is: a model, its batches, its loss and its score, all fixed by one seed.

Shapes are stated by each workload. A batch is a tuple of tensors; `loss(model, batch)` has the one
signature that `gradient_chain`, `diagnose` and `balance_` use too.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Batch = tuple[Tensor, ...]

# Streams keep the draws of one seed apart: weights must not change when a batch is drawn differently.
WEIGHTS, BATCHES, DATA = 1, 2, 3


class MissingDataError(RuntimeError):
    """A workload's data is not installed; the message names the command that installs it."""


class MissingPackageError(MissingDataError):
    """A method's package is not installed; the message names the command that installs it."""


DATA_VARIABLE = "GRADSPLIT_DATA"


def data_path(name: str, call: str, install: str, *, usual: str = "") -> Path:
    """Where a data set lies that no Python package installs: a file or a folder of that name.

    Args:
        name: within the folder that the environment variable GRADSPLIT_DATA names; without it, the working folder.
        call: the caller, for the error.
        install: what to do where it is missing.
        usual: the place where the system's own packages put it.

    Raises:
        MissingDataError: it is in none of these places; the text names `install`.
    """
    places = [Path(os.environ.get(DATA_VARIABLE, ".")) / name, *([Path(usual)] if usual else [])]
    for place in places:
        if place.exists():
            return place
    seen = " and ".join(
        dict.fromkeys([f"{name} in the folder that {DATA_VARIABLE} names", *([usual] if usual else [])])
    )
    raise MissingDataError(f"{call}: expected {seen}, found {'neither' if usual else 'none'}. Run: {install}")


def stream_seed(seed: int, stream: int, step: int = 0) -> int:
    """One 63-bit seed for each (seed, stream, step), spread by two rounds of a multiplicative hash.

    Neighbouring steps must not give neighbouring generator states.

    >>> stream_seed(0, WEIGHTS) == stream_seed(0, WEIGHTS)
    True
    >>> len({stream_seed(s, k, t) for s in range(4) for k in (1, 2, 3) for t in range(50)})
    600
    """
    value = (seed * 1_000_003 + stream) * 1_000_003 + step
    for _ in range(2):
        value = (value ^ (value >> 31)) * 0x9E3779B97F4A7C15 % 2**64
    return value >> 1


def generator(seed: int, stream: int, step: int = 0) -> torch.Generator:
    """A generator of its own for (seed, stream, step), so that no draw depends on the global state."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, step))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run torch's default initialisers from `seed` and leave the caller's global generator as it was.

    >>> before = torch.get_rng_state()
    >>> with seeded(7):
    ...     a = torch.rand(3)
    >>> with seeded(7):
    ...     b = torch.rand(3)
    >>> torch.equal(a, b), torch.equal(before, torch.get_rng_state())
    (True, True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, WEIGHTS))
        yield


class Task(ABC):
    """One model with its data: what a training loop needs, and nothing about how it is trained.

    Subclasses give `draw`, `loss` and `evaluate`; all randomness comes from `seed`.

    Attributes:
        model: the network, initialised from the seed, on `device`.
        seed: fixes the weights and every batch.
        device: where the model and the batches are.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.device = torch.device("cpu")

    @abstractmethod
    def draw(self, step: int) -> Batch:
        """The batch of `step` on the CPU, a pure function of (seed, step)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar that is minimised."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Scores on held-out data, the workload's metric among them; never changes the model."""

    def example(self, model: nn.Module) -> dict[str, Any] | None:
        """What a model makes of one fixed piece of held-out data, for a picture; None: there is none to show."""
        return None

    def batch(self, step: int) -> Batch:
        """The batch of `step` on this task's device; the same for the same (seed, step)."""
        return tuple(part.to(self.device) for part in self.draw(step))

    def to(self, device: str | torch.device) -> Self:
        """Move the model and all later batches to `device`; returns the task itself."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode inside; the model's own mode again afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Classification(Task):
    """Which class is it: a batch is the model's inputs and then the labels (batch,) int64, the score an accuracy."""

    @abstractmethod
    def held_out(self) -> Iterable[Batch]:
        """Inputs and labels that no step sees, on the CPU, in parts that are predicted at once."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy, nats."""
        *inputs, labels = batch
        return F.cross_entropy(model(*inputs), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Give "accuracy" on what is held out; a non-finite prediction is wrong."""
        right = []
        with evaluating(model):
            for *inputs, labels in self.held_out():
                logits = model(*(part.to(self.device) for part in inputs)).cpu()
                right.append((logits.argmax(-1) == labels) & logits.isfinite().all(-1))
        return {"accuracy": float(torch.cat(right).float().mean())}


@dataclass(frozen=True)
class Expected:
    """A number to compare a run with, and what it was measured under.

    Attributes:
        value: the workload's metric after `Workload.steps` steps.
        seconds: processor time of that run, one thread, building and scoring included.
        conditions: seeds, hardware, date and command.
    """

    value: float
    seconds: float
    conditions: str


FIRST_MEASURED = "seed 0, torch 2.13.0, one thread of a busy 2-core Intel Xeon, 2026-11-22"
MEASURED_2026_11_29 = "seed 1000, torch 2.13.0, one thread of a busy 2-core AMD EPYC, 2026-11-29"
WITH_THE_PRESENT_DEFAULT = "seed 1000, torch 2.13.0, one thread of a busy 2-core AMD EPYC, 2026-11-25"


def measured(value: float, seconds: float, command: str, where: str = FIRST_MEASURED) -> Expected:
    """What one seed gave where the project was written; other torch builds round otherwise.

    Args:
        value: the workload's metric.
        seconds: processor time, one thread.
        command: repeats the run.
        where: seed, versions, machine and date.

    >>> measured(0.5, 2.0, "gradsplit compare gpt").conditions.endswith("gradsplit compare gpt")
    True
    """
    return Expected(value, seconds, f"{where}: {command}")


@dataclass(frozen=True)
class Workload:
    """A row of the registry: how to build a task, how to train it and what to expect.

    Attributes:
        name: the name on the command line.
        title: one line for tables.
        metric: the key of `Task.evaluate` that is compared.
        higher_is_better: which way the metric goes.
        steps: the usual number of training steps.
        optimizer: "sgdm" (momentum 0.9), "sgd", "adam" or "adamw".
        lr: the usual learning rate.
        expected: a measured number with its time and conditions.
        data_note: what the data is and where it comes from.
        build: `build(seed=0, **options) -> Task`.
        options: the options of `build` with one sentence each.
    """

    name: str
    title: str
    metric: str
    higher_is_better: bool
    steps: int
    optimizer: str
    lr: float
    expected: Expected
    data_note: str
    build: Callable[..., Task]
    options: dict[str, str] = field(default_factory=dict)

    def better(self, a: float, b: float) -> bool:
        """Whether score `a` beats score `b`; a non-finite score beats nothing.

        Args:
            a: a value of the metric.
            b: a value of the metric.
        """
        finite_a, finite_b = abs(a) < float("inf"), abs(b) < float("inf")
        if not (finite_a and finite_b):
            return finite_a and not finite_b
        return a > b if self.higher_is_better else a < b


def reject_unknown(call: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise the one form of error for an option outside its list.

    Raises:
        ValueError: `value` is not in `allowed`; the text names call, rule and remedy.
    """
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{call}({name}={value!r}): expected one of {choices}. Pass one of them.")
