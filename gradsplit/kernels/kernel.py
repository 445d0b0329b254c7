"""What a kernel does, and the backends by name: one row each, fastest first."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan import Plan

__all__ = [
    "accumulate_dtype",
    "BACKENDS",
    "Backend",
    "FallbackWarning",
    "Formula",
    "FormulaPart",
    "Kernel",
    "choose_backend",
    "register",
]


class FallbackWarning(UserWarning):
    """Part of the work is done by a slower backend with the same result."""


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which squares are added: float64, so that float32 entries up to 3e38 do not overflow.

    Apple's MPS has no float64; there it is float32 and entries above 1.8e19 count as not finite.
    """
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class FormulaPart:
    """What the budgets of one level compute, as statements.

    The names ``norm``, ``weight_norm``, ``numel``, ``num_rows``, ``pace``, ``reach`` and ``kept`` are given, the state
    vectors ``s0``, ``s1``, …, and the formula's numbers ``n0``, ``n1``, ….

    Attributes:
        limits: statements; ``limit`` is the least limit.
        learn: statements for the next history.
        states: the names of the next history after them, in the order of ``s0``, ``s1``, ….
        bounds: whether there is a budget at this level at all.
    """

    limits: str
    learn: str
    states: tuple[str, ...]
    bounds: bool


@dataclass(frozen=True)
class Formula:
    """The budgets of a plan as text, written by `gradsplit.programs`.

    Attributes:
        bins: the part of the bins.
        root: the part of the root.
        numbers: what ``n0``, ``n1``, … stand for.
        numel, num_rows: of the root.
        reads_weights: whether a limit depends on the norms of the weights.
    """

    bins: FormulaPart
    root: FormulaPart
    numbers: tuple[float, ...]
    numel: float
    num_rows: float
    reads_weights: bool


class Kernel(ABC):
    """Reads and scales the bins of one plan on one device; lists everything that callers use.

    A backend defines `squares` and `scale_`. Every other method and attribute has a default that is right for tensors
    that lie whole in one process; a backend overrides what it can do better.

    Args:
        plan: the bins.
        device: where the tensors are.

    Attributes:
        name: the backend's name.
        plan: the bins.
        device: where the tensors are, and where results are returned.
        local_plan: what this process holds of the plan; the plan itself unless tensors are sharded.
        spread_B: (B,) bool, whether some rank holds a part of a bin and not all of it, as of a bias under FSDP.
        is_whole_T: (T,) bool, whether every rank holds the whole tensor.
        bins_are_local: no bin is spread: every rank that holds a part of a bin holds all of it.
        bounds_while_reading: `bound_` can do its work; otherwise a caller need not make the table of limits for it.
        decides: `decider` makes programs for budgets as text; otherwise a caller need not write them.
        by_name: the user asked for this backend by name, so what it cannot do raises where it would fall back.
    """

    name: str
    bounds_while_reading: bool = False
    decides: bool = False
    by_name: bool = False

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.local_plan = plan
        self.spread_B = np.zeros(plan.num_bins, dtype=bool)
        self.is_whole_T = np.ones(len(plan.layout), dtype=bool)
        self.bins_are_local = True

    @abstractmethod
    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the sum of squared entries of each bin: squares_B (B,), gradient units squared.

        A complex entry counts with its squared modulus. The sums have the dtype of `accumulate_dtype` and are added
        over all ranks that hold shards.

        Args:
            tensors: one per entry of the layout, of any dtype, stride and layout that the backend serves; None counts
                as zero.
        """

    @abstractmethod
    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """Multiply each bin by its scale in place; write zeros where ``zero_B``, since 0 * inf is not 0.

        A bin with scale 1 keeps its bits. Nothing is sent between ranks.

        Args:
            tensors: as in `squares`; sparse ones coalesced.
            scale_B: (B,) factors in [0, 1].
            zero_B: (B,) bool.
        """

    def squares_many(self, lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """Return the squares of several lists of tensors, each as `squares` would; in one pass where that is possible.

        Args:
            lists: for example the gradients and the weights.
        """
        return [self.squares(tensors) for tensors in lists]

    def squares_here(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the squares of what this rank holds, (B,); nothing is sent between ranks."""
        return self.squares(tensors)

    def bound_(
        self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor] | None, lines: np.ndarray
    ) -> tuple[Tensor, Tensor | None] | None:
        """Measure each bin, find its limit and scale it in place, all while the bin is in cache.

        The limit of bin b of tensor t, with weights w_b and n_b elements, is the smallest over the lines j of
        ``max(slope ||w_b||, floor + root sqrt(n_b))`` with ``slope, floor, root = lines[j, :, t]``. A bin that is not
        finite becomes zero; weights that are not finite count as zero.

        Args:
            gradients: one per entry of the layout.
            weights: the same for limits that depend on them, else None.
            lines: (J, 3, T), in gradient units: slope per unit of weight, floor, root.

        Returns:
            Squares of the gradients and of the weights as they were, (B,) each, the latter None without weights. None,
            with nothing done, where the kernel cannot do this: then call `squares_many` and `scale_`.
        """
        return None

    def decider(self, formula: Formula, *, collective: bool) -> Any:
        """Return programs that decide for all bins in a few launches; None where there are none.

        Args:
            formula: the budgets as text.
            collective: with the rule of `gradsplit.collective`.
        """
        return None

    def prepare(self, dtypes: Iterable[torch.dtype]) -> bool:
        """Find out now what the first step in these dtypes would have to find out, since that may wait for the device.

        Args:
            dtypes: of the tensors that will come.

        Returns:
            Whether the backend's own programs serve all of them here.
        """
        return True

    def add_(self, values: Tensor) -> Tensor:
        """Add a tensor over the ranks that hold shards, in place, and return it; as it is where nothing is sharded."""
        return values


@dataclass(frozen=True)
class Backend:
    """A way to read and scale bins.

    Attributes:
        name: what users write as ``backend="name"``.
        place: module and class, imported only when used; a `Kernel` made with (plan, device).
        summary: what it is, for lists of backends.
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

    def broken(self) -> str:
        """Say what importing its module raises, such as a package that is installed and does not load; else empty."""
        try:
            importlib.import_module(self.place[0], __package__)
        except Exception as error:  # a package may raise anything while it loads
            return f"importing it raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
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
        Backend(
            "triton",
            (".triton_gpu", "TritonKernel"),
            "a few launches per step by pointer table; it checks itself against the definition on every new card",
            devices=("cuda",),
            needs="triton",
        ),
        Backend("eager", (".eager", "EagerKernel"), "eager torch, vectorised; every device"),
        Backend(
            "reference",
            (".reference", "ReferenceKernel"),
            "the definition, box by box; slow",
            automatic=False,
        ),
    )
}


def register(row: Backend) -> Backend:
    """Add a backend to `BACKENDS`, so that ``backend="its name"`` finds it; return the row.

    ``backend="auto"`` does not choose it: the row stands after `eager`, which serves every device.

    Args:
        row: its ``place`` is the full name of a module, and a class there that derives from `Kernel`.

    Raises:
        TypeError: something that is not a `Backend`.
        ValueError: "auto", or a name that another backend has.
    """
    if not isinstance(row, Backend):
        raise TypeError(f"register({row!r}): expected a Backend(name, (module, class), summary).")
    other = BACKENDS.get(row.name, row)
    if row.name == "auto" or other.place != row.place:
        raise ValueError(
            f"register(Backend({row.name!r}, …)): expected a name that no backend has, and not 'auto'. Choose another "
            "name."
        )
    BACKENDS[row.name] = row
    return row


def choose_backend(name: str, device: torch.device, *, call: str) -> Backend:
    """Return the row of a backend; "auto": the first row that serves the device.

    Args:
        name: "auto" or a key of `BACKENDS`.
        device: where the tensors are.
        call: the caller's name, for errors.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve the device here.

    Warns:
        FallbackWarning: "auto" passes over a backend whose package is installed and does not load; once.

    >>> choose_backend("auto", torch.device("meta"), call="f").name
    'eager'
    """
    if name == "auto":
        return next(
            row for row in BACKENDS.values() if row.automatic and not row.missing(device) and not _passed_over(row)
        )
    if name not in BACKENDS:
        raise ValueError(f"{call}(backend={name!r}): expected 'auto' or one of {', '.join(BACKENDS)}.")
    missing = BACKENDS[name].missing(device) or (BACKENDS[name].broken() if BACKENDS[name].needs else "")
    if missing:
        raise ValueError(
            f"{call}(backend={name!r}): expected a backend that serves {device}, but {missing}. Use 'auto'."
        )
    return BACKENDS[name]


_PASSED_OVER: set[str] = set()  # backends that the user has been warned of


def _passed_over(row: Backend) -> bool:
    """Whether a backend needs a package that is installed and does not load; warns of it once."""
    broken = row.broken() if row.needs else ""
    if broken and row.name not in _PASSED_OVER:
        _PASSED_OVER.add(row.name)
        warnings.warn(
            f"backend {row.name!r} is passed over: {broken}. The next backend has the same results and is slower. "
            f"Mend or remove the package {row.needs}.",
            FallbackWarning,
            stacklevel=5,
        )
    return bool(broken)
