"""Damaged checkpoints of both formats: refused, or, where no byte that counts has changed, what was saved."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import torch
from torch import nn

import gradsplit as gs
from benchmarks.fuzz.verdict import outcome
from gradsplit.resume.checkpoint import read_tree

__all__ = ["checkpoint_bytes", "sound_checkpoint"]

FORMATS = ("torch", "safetensors")


@functools.cache
def sound_checkpoint(file_format: str) -> bytes:
    """The bytes of a small checkpoint."""
    model = nn.Linear(2, 2)
    splitter = gs.GradientSplitter(model, budget=gs.Ema(1.5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ckpt"
        gs.save_checkpoint(path, format=file_format, model=model, splitter=splitter, step=3)
        return path.read_bytes()


def checkpoint_bytes(rng: random.Random) -> str:
    """Bytes changed anywhere; what is loaded is what was saved."""
    data = bytearray(sound_checkpoint(rng.choice(FORMATS)))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(100, len(data)))
        kind = rng.random()
        if kind < 0.6:
            data[at] = rng.randrange(256)
        elif kind < 0.8:
            del data[max(at, 1) :]
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 50))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ckpt"
        path.write_bytes(bytes(data))
        kind_of, tree = outcome(lambda: read_tree(path), what=f"{len(data)} bytes")
        if kind_of == "ok":
            assert tree["parts"]["step"] == 3
            model = nn.Linear(2, 2)
            torch.nn.init.zeros_(model.weight)
            outcome(lambda: gs.load_checkpoint(path, model=model), what="the same bytes")
        return kind_of
