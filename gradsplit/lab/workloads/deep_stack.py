"""The deep stack: 146 plain 3 x 3 convolutions, four pools, no normalisation. The hostile case.

The table `deep_stack.csv` lists the layers at their literal widths, up to 1.3e12 channels: about 1.1e27
parameters, more than 2^63 in one tensor. Such a net exists as names and shapes only (`literal_layout`); the net
that runs has the widths of the table up to a cap. 145 convolutions are as listed by their author, the 146th
follows their pattern.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import torch.nn.functional as F
from torch import Tensor, nn

from ..task import WITH_THE_PRESENT_DEFAULT, Workload, measured, seeded
from .stacks import DATA_NOTE, DigitsTask, he_

NUM_CLASSES = 10
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: "conv1" to "conv146", "pool" to "pool4".
        channels_in: channels that a convolution reads; 0 for a pool.
        channels_out: channels that it writes; 0 for a pool.
    """

    name: str
    channels_in: int
    channels_out: int

    @property
    def is_pool(self) -> bool:
        """Whether this is a 2 x 2 maximum pool and no convolution."""
        return self.channels_out == 0


@lru_cache(maxsize=1)
def read_table() -> tuple[Row, ...]:
    """The 150 rows of the table: 146 convolutions (3 x 3, padding 1) and four pools (2 x 2, stride 2)."""
    text = resources.files("gradsplit.lab.workloads").joinpath("deep_stack.csv").read_text(encoding="utf-8")
    return tuple(
        Row(row["name"], int(row["channels_in"] or 0), int(row["channels_out"] or 0))
        for row in csv.DictReader(text.splitlines())
    )


def literal_layout() -> dict[str, Shape]:
    """Names and shapes at the literal widths, as Python integers, which do not overflow.

    The names are those of the net that runs, `DeepStack`. Nothing is allocated.

    >>> import math
    >>> shapes = literal_layout()
    >>> shapes["body.conv1.weight"], len(shapes)
    ((64, 3, 3, 3), 294)
    >>> max(math.prod(shape) for shape in shapes.values()) > 2**63
    True
    """
    shapes: dict[str, Shape] = {}
    last = 0
    for row in read_table():
        if not row.is_pool:
            last = row.channels_out
            shapes[f"body.{row.name}.weight"] = (row.channels_out, row.channels_in, 3, 3)
            shapes[f"body.{row.name}.bias"] = (row.channels_out,)
    return shapes | {"head.weight": (NUM_CLASSES, last), "head.bias": (NUM_CLASSES,)}


class DeepStack(nn.Module):
    """The table's layers, each convolution followed by ReLU, then the mean over the map and a linear head.

    Pools stand where the table has them. They are left out where the map is a single pixel: at 8 x 8 the fourth. On
    such a map only the middle of a 3 x 3 kernel is ever read. So He's fan-in counts the kernel positions that can lie
    inside the map: 9, or 4 on 2 x 2, or 1. If it counted all nine, each of 130 layers of a single pixel would lose a
    factor of 3.

    Args:
        max_channels: widths are min(listed, max_channels).
        size: pixels a side of the images.
        gain: initialisation in units of He's.
    """

    def __init__(self, max_channels: int, size: int, gain: float) -> None:
        super().__init__()
        self.body = nn.Sequential()
        side, width = size, 3
        for row in read_table():
            if not row.is_pool:
                conv = nn.Conv2d(width, min(row.channels_out, max_channels), 3, padding=1)
                width = conv.out_channels
                he_(conv, gain, taps=min(3, side) ** 2)
                self.body.add_module(row.name, conv)
            elif side > 1:
                self.body.add_module(row.name, nn.MaxPool2d(2, 2))
                side //= 2
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of grey images (n, 1, size, size); the first layer reads three channels, all the same."""
        x = x.expand(-1, 3, -1, -1)
        for layer in self.body:
            x = layer(x) if isinstance(layer, nn.MaxPool2d) else F.relu(layer(x))
        return self.head(x.mean((2, 3)))


class DeepStackTask(DigitsTask):
    """Digits enlarged to the size the stack was built for."""

    def __init__(self, model: nn.Module, seed: int, *, batch: int, size: int) -> None:
        super().__init__(model, seed, batch=batch)
        if size != self.images.shape[-1]:
            self.images = F.interpolate(self.images[:, None], (size, size), mode="bilinear")[:, 0]
            self.test_images = F.interpolate(self.test_images[:, None], (size, size), mode="bilinear")[:, 0]


def build_deep_stack(
    seed: int = 0, *, max_channels: int = 16, size: int = 8, gain: float = 1.0, batch: int = 32
) -> DeepStackTask:
    """The deep stack; see `DEEP_STACK.options`.

    Raises:
        ValueError: no channels, or images smaller than the digits.
    """
    if max_channels < 1:
        raise ValueError(
            f"build_deep_stack(max_channels={max_channels}): expected at least 1. Give the widest layer to allow."
        )
    if size < 8:
        raise ValueError(f"build_deep_stack(size={size}): expected at least 8, the digits' own size. Enlarge it.")
    with seeded(seed):
        model = DeepStack(max_channels, size, gain)
    return DeepStackTask(model, seed, batch=batch, size=size)


DEEP_STACK = Workload(
    name="deep-stack",
    title="146 plain convolutions without normalisation on handwritten digits",
    metric="accuracy",
    higher_is_better=True,
    steps=300,
    optimizer="sgdm",
    lr=0.03,
    expected=measured(
        0.103, 26, "gradsplit compare deep-stack --methods default --lr 0.03 --seeds 1", WITH_THE_PRESENT_DEFAULT
    ),
    data_note=DATA_NOTE,
    build=build_deep_stack,
    options={
        "max_channels": "cap of the table's widths",
        "size": "pixels a side; digits are enlarged (bilinear) above 8",
        "gain": "initialisation in units of He's",
        "batch": "images a step",
    },
)
