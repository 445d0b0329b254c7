"""A run of `gradsplit.GSO` by shares in torch, float64, and what every other framework needs to repeat it."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import nn

import gradsplit as gs
from gradsplit.plan import Layout

STEPS = 12
SHARE = 0.1  # large, so that rows grow to their limit within twelve steps
KINDS = {"token.embedding": "embedding"}
BLOCKS = {"grouped.kernel": 2}


class Model(nn.Module):
    """Tensors of every kind; torch's names are those of `SHAPES` but for the last word."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.fc = nn.Linear(4, 7, dtype=torch.float64)
        self.fc2 = nn.Linear(4, 7, bias=False)
        self.narrow = nn.Linear(1, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.token = nn.Embedding(9, 3)


SHAPES = {
    "scale": (),
    "conv.kernel": (5, 2, 3, 3),
    "conv.bias": (5,),
    "grouped.kernel": (6, 2, 3, 3),
    "fc.kernel": (7, 4),
    "fc.bias": (7,),
    "fc2.kernel": (7, 4),
    "narrow.kernel": (3, 1),
    "token.embedding": (9, 3),
}
LAYOUT = Layout.from_shapes(SHAPES)
LAST = {
    "conv.kernel": (3, 3, 2, 5),
    "grouped.kernel": (3, 3, 2, 6),
    "fc.kernel": (4, 7),
    "fc2.kernel": (4, 7),
    "narrow.kernel": (1, 3),
}
OWN_SHAPES = {name: LAST.get(name, shape) for name, shape in SHAPES.items()}
"""The shapes where output units are last; tokens stay first."""


def weights():
    """Some rows are longer than 3, so that their first length is what they may not exceed."""
    rng = np.random.default_rng(3)
    made = [np.asarray(rng.standard_normal(shape) * 1.3) for shape in SHAPES.values()]
    made[6] *= 0.0  # a projection that begins at zero
    return made


def gradients(step, held):
    """Gradients that differ from row to row; a row, an entry, the vectors and two whole batches are broken at times."""
    rng = np.random.default_rng((5, step))
    made = [np.asarray(rng.standard_normal(w.shape) * 0.03 - 0.06 * w) for w in held]
    if step == 4:
        made[4][2] *= 1e6
    if step in (5, 6):
        made[1][3, 0, 1, 1] = (np.nan, np.inf)[step == 6]
    if step in (7, 8):
        made = [np.asarray(g * 1e3) for g in made]
    if step == 9:
        made[6][1] = 0.0
    if step == 10:  # three vectors outweigh the matrices
        for t in (0, 2, 5):
            made[t] = np.asarray(made[t] * 1e3)
    return made


def turned(arrays):
    """The same arrays with output units last."""
    last = [np.moveaxis(np.moveaxis(a, 0, -1), 0, -2) if a.ndim > 1 else a for a in arrays[:-1]]
    return [*last, arrays[-1]]


def turned_back(arrays):
    arrays = [np.asarray(a) for a in arrays]
    first = [np.moveaxis(np.moveaxis(a, -1, 0), -1, 1) if a.ndim > 1 else a for a in arrays[:-1]]
    return [*first, arrays[-1]]


@cache
def in_torch(steps=STEPS):
    """(weights after every step, how often a row was drawn back to its longest length)."""
    model = Model().double()
    parameters = [dict(model.named_parameters())[_name_in_torch(name)] for name in SHAPES]
    with torch.no_grad():
        for p, w in zip(parameters, weights(), strict=True):
            p.copy_(torch.from_numpy(w))
    optimizer = gs.GSO(model, lr=SHARE, backend="reference")
    made, grew = [], 0
    for step in range(steps):
        held = [p.detach().numpy().copy() for p in parameters]
        for p, g in zip(parameters, gradients(step, held), strict=True):
            p.grad = torch.from_numpy(g)
        optimizer.step()
        (part,) = optimizer._parts
        grew += int(part.update.grown_B.sum())
        made.append([p.detach().numpy().copy() for p in parameters])
    return made, grew


def _name_in_torch(name):
    return name.replace("kernel", "weight").replace("embedding", "weight")


def distance(ours, theirs):
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
