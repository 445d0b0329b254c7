"""In which dtype squares are added."""

from __future__ import annotations

import torch

__all__ = ["accumulate_dtype"]


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which squares are added: float64, so that float32 entries up to 3e38 do not overflow.

    Apple's MPS has no float64; there it is float32 and entries above 1.8e19 count as not finite.
    """
    return torch.float32 if device.type == "mps" else torch.float64
