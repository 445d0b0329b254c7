"""A denoising diffusion model of handwritten digits (Ho, Jain and Abbeel 2020): it predicts the noise in an image.

Batch: (noisy images (batch, 1, 8, 8), noise levels (batch,) int64 in [0, 100), noise (batch, 1, 8, 8)). Images are
scaled to [-1, 1]; the levels follow the linear schedule of the paper, shortened to 100. The metric is the mean square
error of the noise over the test digits, at noise and levels that are the same at every call; lower is better.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import BATCHES, DATA, MEASURED_2026_11_29, Batch, Task, Workload, evaluating, generator, measured, seeded
from .digits import load_digits

LEVELS = 100
REPEATS = 4  # draws of noise and level per test digit


def kept_share() -> Tensor:
    """Share of the image's variance that is left at each level, (100,): the products of 1 - beta.

    >>> kept = kept_share()
    >>> round(float(kept[0]), 3), float(kept[-1]) < 0.01
    (0.999, True)
    """
    return torch.cumprod(1.0 - torch.linspace(1e-3, 0.2, LEVELS, dtype=torch.float64), 0).float()


class Stage(nn.Module):
    """A residual pair of convolutions with GroupNorm; the level is added to the channels between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.level = nn.Linear(width, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Map (n, width, 8, 8) and levels (n, width) to (n, width, 8, 8)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.level(level)[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class Denoiser(nn.Module):
    """Sinusoids of the level through a small perceptron, a stem, residual stages, a head that starts at zero."""

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.width = width
        self.level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = nn.Conv2d(1, width, 3, 1, 1)
        self.stages = nn.ModuleList(Stage(width) for _ in range(stages))
        self.norm = nn.GroupNorm(4, width)
        self.head = nn.Conv2d(width, 1, 3, 1, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
        """The noise (n, 1, 8, 8) in noisy images of these levels (n,)."""
        half = self.width // 2
        turns = torch.exp(-math.log(1e4) * torch.arange(half, device=noisy.device) / half)
        angles = levels[:, None].to(noisy.dtype) * turns
        level = F.silu(self.level(torch.cat([angles.sin(), angles.cos()], 1)))
        h = self.stem(noisy)
        for stage in self.stages:
            h = stage(h, level)
        return self.head(F.silu(self.norm(h)))


class DiffusionTask(Task):
    """Tell the noise from the digit."""

    def __init__(self, model: nn.Module, seed: int, *, batch: int) -> None:
        super().__init__(model, seed)
        train, _, test, _ = load_digits()
        self.images, self.batch_size, self.kept = 2.0 * train[:, None] - 1.0, batch, kept_share()
        repeated = (2.0 * test[:, None] - 1.0).repeat(REPEATS, 1, 1, 1)
        self.test = self._noised(repeated, generator(0, DATA, 4))

    def _noised(self, images: Tensor, source: torch.Generator) -> Batch:
        levels = torch.randint(LEVELS, (len(images),), generator=source)
        noise = torch.randn(images.shape, generator=source)
        kept = self.kept[levels].view(-1, 1, 1, 1)
        return kept.sqrt() * images + (1 - kept).sqrt() * noise, levels, noise

    def draw(self, step: int) -> Batch:
        """Digits drawn with replacement, each at a random level."""
        source = generator(self.seed, BATCHES, step)
        picks = torch.randint(len(self.images), (self.batch_size,), generator=source)
        return self._noised(self.images[picks], source)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean square error of the noise."""
        noisy, levels, noise = batch
        return F.mse_loss(model(noisy, levels), noise)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Give "val_loss", the mean square error over 360 test digits at four levels each."""
        noisy, levels, noise = (part.to(self.device) for part in self.test)
        with evaluating(model):
            return {"val_loss": float(F.mse_loss(model(noisy, levels), noise))}


def build_diffusion(seed: int = 0, *, width: int = 32, stages: int = 3, batch: int = 32) -> DiffusionTask:
    """The diffusion task; see `DIFFUSION.options`."""
    with seeded(seed):
        model = Denoiser(width, stages)
    return DiffusionTask(model, seed, batch=batch)


DIFFUSION = Workload(
    name="diffusion",
    title="denoising diffusion of handwritten digits",
    metric="val_loss",
    higher_is_better=False,
    steps=300,
    optimizer="adamw",
    lr=3e-3,
    expected=measured(
        0.103,
        4,
        "gradsplit compare diffusion --methods gso --lr usual --schedule linear --seeds 1",
        MEASURED_2026_11_29,
    ),
    data_note="scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,437 for training, 360 for testing.",
    build=build_diffusion,
    options={"width": "channels", "stages": "residual stages", "batch": "images a step"},
)
