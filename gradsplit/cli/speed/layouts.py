"""Layouts of well-known networks as bare shapes: what a step costs depends on them alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["LAYOUTS", "parameters_of"]

Shapes = dict[str, tuple[int, ...]]


def gpt(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """A GPT with tied embeddings."""
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(layers):
        for name, rows, cols in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.up", 4 * width, width),
            ("mlp.down", width, 4 * width),
        ):
            shapes[f"h.{i}.{name}.weight"] = (rows, cols)
            shapes[f"h.{i}.{name}.bias"] = (rows,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (width,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (width,)
    return shapes


def resnet50() -> Shapes:
    """ResNet-50: bottlenecks of 3, 4, 6 and 3."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            convolutions = [
                ("1", (width, channels, 1, 1)),
                ("2", (width, width, 3, 3)),
                ("3", (4 * width, width, 1, 1)),
            ]
            if block == 0:
                convolutions.append(("0", (4 * width, channels, 1, 1)))
            for name, shape in convolutions:
                place = f"layer{stage}.{block}"
                shapes[f"{place}.conv{name}.weight"] = shape
                shapes[f"{place}.bn{name}.weight"] = shapes[f"{place}.bn{name}.bias"] = (shape[0],)
            channels = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


LAYOUTS: dict[str, Callable[[], Shapes]] = {
    "gpt-23m": lambda: gpt(6, 384, 32_000, 512),
    "gpt-124m": lambda: gpt(12, 768, 50_257, 1_024),
    "resnet-50": resnet50,
    "small-tensors": lambda: {f"p{i}": (4_096,) for i in range(1_600)},
    "small-matrices": lambda: {f"p{i}": (64, 64) for i in range(1_600)},
}
"""Name -> the shapes of its tensors."""


def parameters_of(shapes: Shapes) -> tuple[list[tuple[str, Parameter]], list[Tensor]]:
    """Return named parameters with gradients, and a second copy of the gradients to fill them from."""
    generator = torch.Generator().manual_seed(0)
    pairs, sources = [], []
    for name, shape in shapes.items():
        parameter = Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * 1e-4
        pairs.append((name, parameter))
        sources.append(parameter.grad.clone())
    return pairs, sources
