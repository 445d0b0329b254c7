"""What the laws run over: every row of every registry, and a zoo of tensors.

A new row of a registry is drawn in by itself, or fails the test that says what it needs here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import gradsplit as gs
from gradsplit.kernels import BACKENDS
from gradsplit.plan import STRATEGIES, Layout, Plan, lbf, tree_sp, xsp

CPU = torch.device("cpu")

# Every kind of shape: 0-d, 1-d, empty in either view, one row, one column, convolutions of one and two dimensions, 3-d.
ZOO = Layout.from_shapes(
    {
        "scale": (),
        "stem.conv.weight": (4, 3, 3, 3),
        "stem.conv.bias": (4,),
        "stem.none": (0,),
        "body.0.fc.weight": (6, 5),
        "body.0.fc.bias": (6,),
        "body.1.conv1d.weight": (3, 2, 5),
        "body.1.row": (1, 7),
        "body.1.column": (7, 1),
        "body.1.no_rows": (0, 4),
        "head.no_columns": (3, 0),
        "head.one": (1,),
    }
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
STRIDES = ("contiguous", "transposed", "channels_last", "gaps", "sparse")

# One instance a row of BUDGETS, tight enough to bind; histories are short, so in force within a few steps.
BUDGETS: dict[str, gs.Budget] = {
    "relative_step": gs.RelativeStep(0.03),
    "fixed": gs.Fixed(0.5),
    "relative": gs.Relative(0.05),
    "ema": gs.Ema(1.05, beta=0.5, warmup=2, patience=2),
    "zscore": gs.ZScore(0.5, beta=0.5, warmup=2),
    "percentile": gs.Percentile(0.5, eta=0.1),
    "running_median": gs.budget.RunningMedian(1.5, eta=0.1, early=2),
}


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def energies(layout: Layout, seed: int = 0) -> dict[str, np.ndarray]:
    """Energies with structure along both axes, so that L-BF has something to cut."""
    rng = generator(seed)
    made = {}
    for name, rows, cols, shape in zip(layout.names, layout.rows, layout.cols, layout.shapes, strict=True):
        blocks = np.exp(3 * rng.standard_normal((rows, 1))) * np.exp(3 * rng.standard_normal((1, cols)))
        made[name] = (blocks * rng.exponential(size=(rows, cols))).reshape(shape)
    return made


def plan_of(strategy: str, layout: Layout) -> Plan:
    """The plan of a registry row with its default options."""
    row = STRATEGIES[strategy]
    return row.make(layout, energies(layout)) if row.needs_energy else row.make(layout)


VARIANTS = {
    "xsp, 3 parts": lambda layout: xsp(layout, parts=3),
    "xsp, columns": lambda layout: xsp(layout, axis=1),
    "xsp, 2 parts of columns": lambda layout: xsp(layout, parts=2, axis=1),
    "lbf, few bins": lambda layout: lbf(layout, energies(layout), max_bins=len(layout) + 9, min_gain=0.0),
    "tree_sp over rows": lambda layout: tree_sp(layout, inner="xsp"),
    "tree_sp over lbf": lambda layout: tree_sp(layout, inner=lambda inner: lbf(inner, energies(inner), max_bins=40)),
}
"""Options that change what a strategy does."""

PLANS = {name: (lambda layout, name=name: plan_of(name, layout)) for name in STRATEGIES} | VARIANTS


def served_backends() -> list[str]:
    """The backends that can serve this machine's CPU; the others are named by test_registries."""
    return [name for name, row in BACKENDS.items() if not row.missing(CPU)]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, size: float = 1.0) -> torch.Tensor:
    """Random values, a tenth of them exactly 0."""
    rng = generator(seed)
    array = rng.standard_normal(shape) * size * (rng.random(shape) > 0.1)
    if dtype.is_complex:
        array = array + 1j * rng.standard_normal(shape) * size
    return torch.from_numpy(np.asarray(array)).to(dtype)


def in_strides(tensor: torch.Tensor, strides: str) -> torch.Tensor | None:
    """The same values in another memory layout; None where that layout does not exist for this shape."""
    if strides == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if strides == "transposed":
        if tensor.dim() < 2:
            return None
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "channels_last":
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else None
    if strides == "gaps":
        if tensor.dim() == 0:
            return None
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    # Sparse: the gradient of an embedding, whose untouched rows are 0.
    if tensor.dim() < 2 or tensor.numel() == 0:
        return None
    dense = tensor.clone()
    dense[1::2] = 0
    return dense.to_sparse(1).coalesce()


def tensors(layout: Layout, dtype: torch.dtype, strides: str, seed: int, *, size: float = 1.0) -> list[torch.Tensor]:
    """One tensor a layout entry; where a memory layout does not exist for a shape, a contiguous one."""
    made = []
    for t, shape in enumerate(layout.shapes):
        plain = values(shape, dtype, seed + t, size=size)
        other = in_strides(plain, strides)
        made.append(plain if other is None else other)
    return made


def parameters(layout: Layout, dtype: torch.dtype = torch.float64, seed: int = 100) -> list[tuple[str, nn.Parameter]]:
    """Named parameters of a layout with random values."""
    return [
        (name, nn.Parameter(values(shape, dtype, seed + t)))
        for t, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True))
    ]


def sgd(pairs: list[tuple[str, nn.Parameter]], lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([p for _, p in pairs], lr=lr, momentum=0.9)


def splitter_of(
    pairs: list[tuple[str, nn.Parameter]], plan: Plan, budget: object, **options: object
) -> gs.GradientSplitter:
    """A splitter that can read a learning rate, for budgets that need one."""
    return gs.GradientSplitter(pairs, plan, budget, optimizer=sgd(pairs), **options)
