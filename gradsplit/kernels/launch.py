"""Launching Triton programs: on the device of their tensors, and in one place, so that launches can be counted."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

__all__ = ["launch"]


def launch(device: torch.device, program: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    """Launch a program on a device; Triton would take the current one, wherever the tensors are.

    Args:
        device: of the tensors.
        program: a `triton.jit` function.
        grid: how many programs run, along up to three axes; nothing is launched where one is 0.
        *arguments: of the program.
    """
    if all(grid):
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            program[grid](*arguments)
