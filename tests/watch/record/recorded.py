"""Rows with known numbers, for the tests of the run file and of the account."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradsplit.plan import Layout
from gradsplit.watch.record import Outline, Rows, RunWriter, Stream, recording_plan

SHAPES = {"enc.0.weight": (8, 4), "enc.0.bias": (8,), "enc.1.weight": (8, 4), "head.weight": (4, 8)}


def outline(shapes: dict[str, tuple[int, ...]] | None = None, **options: int) -> Outline:
    """The outline of a small model that is only measured."""
    layout = Layout.from_shapes(shapes or SHAPES)
    return Outline.of(recording_plan(layout, **options), **options)


def rows_of(stream: Stream, norm_SL: np.ndarray, *, first_step: int = 0, **columns: np.ndarray) -> Rows:
    """Rows with the given norms, a step each, a second apart."""
    steps = np.arange(first_step, first_step + len(norm_SL))
    ones = np.ones(len(norm_SL))
    given = {
        "loss_S": 2.0 - 0.001 * steps,
        "lr_S": 0.1 * ones,
        "own_scale_S": ones,
        "skipped_S": 0 * ones.astype(np.uint8),
        **columns,
    }
    return Rows(stream, steps, 1e9 + steps, norm_SL=norm_SL.astype(np.float32), **given)


def noise(num_rows: int, num_leaves: int, *, seed: int = 0) -> np.ndarray:
    """Norms of a healthy run: each leaf at a level of its own, log-normal with a factor of 1.35."""
    rng = np.random.default_rng(seed)
    return np.exp(np.linspace(-4, 2, num_leaves) + 0.3 * rng.standard_normal((num_rows, num_leaves)))


def write_run(
    path: Path, norm_SL: np.ndarray, *, flush: int = 50, stream: Stream | None = None, **meta: object
) -> Path:
    """A run file of a stream that was only measured."""
    stream = stream or Stream(0, "AdamW", outline())
    writer = RunWriter(path, {"argv": ["train.py"], "mode": "watch", **meta})
    for first in range(0, len(norm_SL), flush):
        writer.write([rows_of(stream, norm_SL[first : first + flush], first_step=first)])
    writer.close()
    return path
