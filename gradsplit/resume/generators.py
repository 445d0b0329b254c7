"""The random generators of a process as plain data: Python's, numpy's global one, and torch's on every device."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["generators_state", "load_generators_state"]


def generators_state() -> dict[str, Any]:
    """Return what the next random number depends on, as tensors, numbers, strings and lists.

    Generators that a user made (``torch.Generator()``, ``numpy.random.default_rng()``) are not among them.

    >>> before = generators_state()
    >>> first = random.random(), torch.rand(()).item()
    >>> load_generators_state(before)
    >>> first == (random.random(), torch.rand(()).item())
    True
    """
    version, words, gauss = random.getstate()
    legacy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002 - the one that others draw from
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [
            legacy["bit_generator"],
            torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            int(legacy["state"]["pos"]),
            int(legacy["has_gauss"]),
            float(legacy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
        "cuda": [],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_generators_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where `generators_state` left off; devices that are absent now are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, key, *numbers = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *numbers))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
