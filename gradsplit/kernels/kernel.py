"""The backends by name, one row each, fastest first; the rows parametrise tests and benchmarks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..plan import Plan

__all__ = ["accumulate_dtype", "BACKENDS", "Backend", "Kernel", "make_kernel", "squares_of"]


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which squares are added: float64, so that float32 entries up to 3e38 do not overflow.

    Apple's MPS has no float64; there it is float32 and entries above 1.8e19 count as not finite.
    """
    return torch.float32 if device.type == "mps" else torch.float64


class Kernel(Protocol):
    """Reads and scales the bins of one plan on one device."""

    name: str

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return each bin's sum of squares, shape (B,)."""

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """Multiply each bin by its scale in place; zeros where ``zero_B``."""


@dataclass(frozen=True)
class Backend:
    """A way to read and scale bins.

    Attributes:
        name: what users write as ``backend="name"``.
        place: module and class, imported only when used.
        automatic: ``backend="auto"`` may choose it.
        devices: device types it serves; empty: all.
        needs: the package it needs beside torch, and the extra that installs it.
    """

    name: str
    place: tuple[str, str]
    summary: str
    automatic: bool = True
    devices: tuple[str, ...] = ()
    needs: str = ""

    def missing(self, device: torch.device) -> str:
        """Say why it cannot serve a device here; empty if it can."""
        if self.devices and device.type not in self.devices:
            return f"it serves {', '.join(self.devices)}, not {device.type}"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"it needs the package {self.needs}: pip install {self.needs}"
        return ""

    def make(self, plan: Plan, device: torch.device) -> Kernel:
        """Import the backend and bind it to a plan and device."""
        module, name = self.place
        kernel: Kernel = getattr(importlib.import_module(module, __package__), name)(plan, device)
        return kernel


BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend(
            "numba",
            (".numba_cpu", "NumbaKernel"),
            "compiled loops over memory, as many threads as torch; dense tensors on the CPU",
            devices=("cpu",),
            needs="numba",
        ),
        Backend("eager", (".eager", "EagerKernel"), "eager torch, vectorised; every device"),
        Backend(
            "triton",
            (".triton_gpu", "TritonKernel"),
            "one launch a dtype by pointer table; checked in Triton's interpreter, never on a graphics card",
            automatic=False,
            devices=("cuda",),
            needs="triton",
        ),
        Backend(
            "reference",
            (".reference", "ReferenceKernel"),
            "the definition, box by box; slow",
            automatic=False,
        ),
    )
}


def squares_of(kernel: Kernel, *lists: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the squares of several lists of tensors, in one pass where the kernel can."""
    many = getattr(kernel, "squares_many", None)
    made: list[Tensor] = [kernel.squares(tensors) for tensors in lists] if many is None else many(lists)
    return made


def make_kernel(backend: str, plan: Plan, device: torch.device, *, call: str) -> Kernel:
    """Return the kernel of a backend for a plan; "auto": the first row that serves the device.

    Raises:
        ValueError: unknown name, or a backend that cannot serve the device here.
    """
    if backend == "auto":
        row = next(row for row in BACKENDS.values() if row.automatic and not row.missing(device))
        return row.make(plan, device)
    if backend not in BACKENDS:
        raise ValueError(f"{call}(backend={backend!r}): expected 'auto' or one of {', '.join(BACKENDS)}.")
    missing = BACKENDS[backend].missing(device)
    if missing:
        raise ValueError(
            f"{call}(backend={backend!r}): expected a backend that serves {device}, but {missing}. Use 'auto'."
        )
    return BACKENDS[backend].make(plan, device)
