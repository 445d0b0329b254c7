"""Deep convolution stacks without normalisation on real handwriting: where explosions are born.

Batch: (images (n, 1, 8, 8) float32, labels (n,) int64). The metric is the accuracy on the 360 test digits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import BATCHES, WITH_THE_PRESENT_DEFAULT, Batch, Classification, Workload, generator, measured, seeded
from .digits import load_digits

DATA_NOTE = "scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels: 1,437 for training, 360 for testing."


def he_(conv: nn.Conv2d, gain: float, taps: int | None = None) -> None:
    """Normal weights of standard deviation gain * sqrt(2 / fan_in), zero bias.

    Args:
        conv: the layer, initialised in place.
        gain: 1 keeps the mean square of a rectified signal (He et al. 2015).
        taps: kernel positions that count in the fan-in; all of them by default.
    """
    kernel = conv.kernel_size[0] * conv.kernel_size[1] if taps is None else taps
    nn.init.normal_(conv.weight, std=gain * math.sqrt(2.0 / (conv.in_channels * kernel)))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class ResidualBlock(nn.Module):
    """x + conv(relu(x)): at gain g the mean square of x grows by a factor of about 1 + g^2 a block."""

    def __init__(self, channels: int, gain: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        he_(self.conv, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, h, w) to the same shape."""
        return x + self.conv(F.relu(x))


class ResidualStack(nn.Module):
    """Stem, residual blocks, mean over the map, linear head; `gain` applies to the blocks only."""

    def __init__(self, blocks: int, channels: int, gain: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        he_(self.stem, 1.0)
        self.blocks = nn.ModuleList(ResidualBlock(channels, gain) for _ in range(blocks))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        h = F.relu(self.stem(x))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((2, 3)))


class PlainStack(nn.Module):
    """`depth` convolutions with ReLU and nothing else, mean over the map, linear head."""

    def __init__(self, depth: int, channels: int, gain: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if n else 1, channels, 3, stride=1 if n else 2, padding=1) for n in range(depth)
        )
        self.head = nn.Linear(channels, 10)
        for conv in self.convs:
            if isinstance(conv, nn.Conv2d):
                he_(conv, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.head(x.mean((2, 3)))


class DigitsTask(Classification):
    """Classify handwritten digits."""

    def __init__(self, model: nn.Module, seed: int, *, batch: int) -> None:
        super().__init__(model, seed)
        self.batch_size = batch
        self.images, self.labels, self.test_images, self.test_labels = load_digits()

    def draw(self, step: int) -> Batch:
        """Images drawn with replacement from the training digits."""
        picks = torch.randint(len(self.labels), (self.batch_size,), generator=generator(self.seed, BATCHES, step))
        return self.images[picks][:, None], self.labels[picks]

    def held_out(self) -> list[Batch]:
        """The test digits."""
        return [(self.test_images[:, None], self.test_labels)]


def build_residual_stack(
    seed: int = 0, *, gain: float = 3.0, blocks: int = 48, channels: int = 16, batch: int = 32
) -> DigitsTask:
    """The residual stack; see `RESIDUAL_STACK.options`."""
    with seeded(seed):
        model = ResidualStack(blocks, channels, gain)
    return DigitsTask(model, seed, batch=batch)


def build_plain_stack(
    seed: int = 0, *, gain: float = 1.0, depth: int = 12, channels: int = 16, batch: int = 32
) -> DigitsTask:
    """The plain stack; see `PLAIN_STACK.options`."""
    with seeded(seed):
        model = PlainStack(depth, channels, gain)
    return DigitsTask(model, seed, batch=batch)


RESIDUAL_STACK = Workload(
    name="residual-stack",
    title="48 residual convolutions without normalisation, hot initialisation, on handwritten digits",
    metric="accuracy",
    higher_is_better=True,
    steps=900,
    optimizer="sgdm",
    lr=0.1,
    expected=measured(
        0.906, 38, "gradsplit compare residual-stack --methods default --lr 0.1 --seeds 1", WITH_THE_PRESENT_DEFAULT
    ),
    data_note=DATA_NOTE,
    build=build_residual_stack,
    options={
        "gain": "initialisation of the blocks in units of He's; 3 is hot, 0.5 healthy",
        "blocks": "residual blocks, one convolution each",
        "channels": "channels of every convolution",
        "batch": "images a step",
    },
)

PLAIN_STACK = Workload(
    name="plain-stack",
    title="12 plain convolutions, He initialisation, on handwritten digits",
    metric="accuracy",
    higher_is_better=True,
    steps=350,
    optimizer="sgdm",
    lr=0.03,
    expected=measured(
        0.836, 5, "gradsplit compare plain-stack --methods default --lr 0.03 --seeds 1", WITH_THE_PRESENT_DEFAULT
    ),
    data_note=DATA_NOTE,
    build=build_plain_stack,
    options={
        "gain": "initialisation in units of He's",
        "depth": "convolutions",
        "channels": "channels of every convolution",
        "batch": "images a step",
    },
)
