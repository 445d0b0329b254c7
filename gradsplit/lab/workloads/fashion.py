"""Clothes of Fashion-MNIST, 28 x 28 grey pixels in ten classes: a small ResNet with BatchNorm, and a small ViT.

Batch: (images (batch, 1, 28, 28) float32, mean 0 and deviation 1 over the training pixels, labels (batch,) int64).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import (
    BATCHES,
    MEASURED_2026_11_29,
    Batch,
    Classification,
    Workload,
    data_path,
    generator,
    measured,
    seeded,
)

INSTALL = "apt-get install dataset-fashion-mnist"
USUAL = "/usr/share/datasets/fashion-mnist"
NUM_CLASSES, NUM_TEST = 10, 2000
MEAN, DEVIATION = 0.2860, 0.3530  # of the 60,000 training images, in [0, 1]
_IMAGES_HEADER, _LABELS_HEADER = 16, 8  # bytes before the values, as the IDX format has them


@lru_cache(maxsize=1)
def load_fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels.

    Returns:
        images (60000, 28, 28) and (10000, 28, 28) uint8; labels int64.

    Raises:
        MissingDataError: the data is not installed.
        ValueError: a file is cut off.
    """
    folder = data_path("fashion-mnist", "load_fashion()", INSTALL, usual=USUAL)
    parts: list[Tensor] = []
    for name in ("train", "t10k"):
        images = _values(folder / f"{name}-images-idx3-ubyte.gz", _IMAGES_HEADER)
        labels = _values(folder / f"{name}-labels-idx1-ubyte.gz", _LABELS_HEADER)
        if len(images) != 784 * len(labels):
            raise ValueError(
                f"load_fashion(): expected 784 bytes for each of {len(labels)} labels in {name}-images-idx3-ubyte.gz, "
                f"got {len(images)}. Install the data again."
            )
        parts += [torch.from_numpy(images).view(-1, 28, 28), torch.from_numpy(labels.astype(np.int64))]
    train_images, train_labels, test_images, test_labels = parts
    return train_images, train_labels, test_images, test_labels


def _values(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        made: np.ndarray = np.frombuffer(file.read(), np.uint8, offset=header).copy()
    return made


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm beside a shortcut; a stride halves the image."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels_in, h, w) to (n, channels, h / stride, w / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """A strided stem, three stages of one residual block, the mean over pixels, a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10)."""
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


class Encoder(nn.Module):
    """Pre-norm transformer block without a mask: every place sees every place."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (batch, places, width) to the same shape; `mask` (batch, 1, 1, places) is true where a place is read."""
        batch, places, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, places, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, places, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 7 x 7 pixels, learned positions, a class token, pre-norm blocks, a linear head on the token."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Encoder(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, 0]))


class FashionTask(Classification):
    """Which piece of clothing is it."""

    def __init__(self, model: nn.Module, seed: int, *, batch: int) -> None:
        super().__init__(model, seed)
        self.batch_size = batch
        self.images, self.labels, test_images, test_labels = load_fashion()
        self.test_images, self.test_labels = _scaled(test_images[:NUM_TEST]), test_labels[:NUM_TEST]

    def draw(self, step: int) -> Batch:
        """Images drawn with replacement from the training part, half of them mirrored."""
        source = generator(self.seed, BATCHES, step)
        picks = torch.randint(len(self.labels), (self.batch_size,), generator=source)
        mirrored = torch.rand(self.batch_size, 1, 1, 1, generator=source) < 0.5
        images = _scaled(self.images[picks])
        return torch.where(mirrored, images.flip(3), images), self.labels[picks]

    def held_out(self) -> Iterator[Batch]:
        """The first 2,000 test images."""
        return zip(self.test_images.split(500), self.test_labels.split(500), strict=True)


def _scaled(images: Tensor) -> Tensor:
    return ((images.float() / 255.0 - MEAN) / DEVIATION)[:, None]


def build_fashion_resnet(seed: int = 0, *, width: int = 12, batch: int = 32) -> FashionTask:
    """The ResNet's task; see `FASHION_RESNET.options`."""
    with seeded(seed):
        model = ResNet(width)
    return FashionTask(model, seed, batch=batch)


def build_fashion_vit(
    seed: int = 0, *, layers: int = 3, width: int = 64, heads: int = 4, batch: int = 32
) -> FashionTask:
    """The ViT's task; see `FASHION_VIT.options`."""
    with seeded(seed):
        model = ViT(layers, width, heads)
    return FashionTask(model, seed, batch=batch)


_DATA_NOTE = (
    f"Fashion-MNIST (Zalando, MIT): 60,000 images for training, 2,000 of the 10,000 for testing. {INSTALL}, or the "
    "folder fashion-mnist in the one that GRADSPLIT_DATA names."
)

FASHION_RESNET = Workload(
    name="fashion-resnet",
    title="small ResNet with BatchNorm on Fashion-MNIST",
    metric="accuracy",
    higher_is_better=True,
    steps=300,
    optimizer="adamw",
    lr=3e-3,
    expected=measured(
        0.842,
        4,
        "gradsplit compare fashion-resnet --methods gso --lr usual --schedule linear --seeds 1",
        MEASURED_2026_11_29,
    ),
    data_note=_DATA_NOTE,
    build=build_fashion_resnet,
    options={"width": "channels of the first stage", "batch": "images a step"},
)

FASHION_VIT = Workload(
    name="fashion-vit",
    title="small ViT on Fashion-MNIST",
    metric="accuracy",
    higher_is_better=True,
    steps=300,
    optimizer="adamw",
    lr=3e-3,
    expected=measured(
        0.789,
        5,
        "gradsplit compare fashion-vit --methods gso --lr usual --schedule linear --seeds 1",
        MEASURED_2026_11_29,
    ),
    data_note=_DATA_NOTE,
    build=build_fashion_vit,
    options={
        "layers": "number of blocks",
        "width": "width of the model",
        "heads": "attention heads a block",
        "batch": "images a step",
    },
)
