"""Reading and writing by address: which tensors allow it, what is wrong with the others, and a kernel for both."""

from __future__ import annotations

import operator
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..hooks import constant_while_traced
from ..plan import Plan
from ..plan.lowering import is_addressable
from .kernel import BACKENDS, FallbackWarning, Kernel

__all__ = [
    "DTYPES",
    "PLAIN",
    "AddressKernel",
    "FallbackWarning",
    "LastFour",
    "Signature",
    "addressed",
    "bump_versions",
    "obstacle",
    "only",
    "overlap",
    "refuse_expanded",
    "remedy_of",
    "warn_of_fallback",
]

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
"""The dtypes that compiled programs read and write by address."""

PLAIN = (Tensor, Parameter)
"""The types whose memory is their own."""


def obstacle(tensor: Tensor, device: str = "cpu") -> str:
    """Say why a tensor must not be read and written by address on a type of device; empty if it may.

    Strides are judged by `gradsplit.plan.lowering`.

    Args:
        tensor: of any kind.
        device: the type of device whose memory the program addresses.

    >>> obstacle(torch.zeros(2)), obstacle(torch.zeros(2).to_sparse())
    ('', 'its layout is torch.sparse_coo')
    """
    there = tensor.is_cpu if device == "cpu" else tensor.device.type == device
    plain = type(tensor) in PLAIN and there and tensor.layout is torch.strided
    if plain and not (tensor.is_neg() or (tensor.is_complex() and tensor.is_conj())):  # the usual case, kept fast
        return "" if tensor.data_ptr() else "it has no memory"
    if type(tensor) not in PLAIN:
        return f"it is a {type(tensor).__name__}, whose memory may not be its own"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if not there:
        return f"it lives on {tensor.device}"
    return "its memory holds the negative or conjugate of its values"


def remedy_of(reason: str) -> str:
    """What to do about a reason why a tensor is not addressed, as a sentence."""
    if "strides" in reason:
        return "Make the parameter contiguous, or use backend='eager'."
    if reason.startswith("its dtype is") and "," in reason:
        return "Give the parameter, its gradient and its moments one dtype, or use backend='eager'."
    return "Use backend='eager'."


def warn_of_fallback(what: str, name: str, reason: str, remedy: str) -> None:
    """Warn that a tensor is served by eager torch; the caller sees to it that this comes once.

    Args:
        what: what falls back, as the first words of the warning.
        name: the tensor.
        reason: what is wrong with it, without a full stop.
        remedy: what to do, as a sentence.
    """
    warnings.warn(
        f"{what} falls back to eager torch for {name!r}: {reason}. The result is the same, only slower. {remedy}",
        FallbackWarning,
        stacklevel=4,
    )


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether any two of the tensors share memory; then the order of writes matters, and one thread does the work."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    sizes = np.array(
        [
            tensor.element_size() * (1 + sum((n - 1) * d for n, d in zip(tensor.shape, tensor.stride(), strict=True)))
            for tensor in tensors
        ],
        dtype=np.int64,
    )
    order = np.argsort(starts)
    starts, stops = starts[order], (starts + sizes)[order]
    return bool((starts[1:] < stops[:-1]).any())


def refuse_expanded(error: RuntimeError, names: Sequence[str], tensors: Sequence[Tensor | None], *, call: str) -> None:
    """Name the tensor where torch has refused to write to one whose entries share memory.

    Raises:
        RuntimeError: the error was that one.
    """
    pairs = zip(names, tensors, strict=True)
    name = next((name for name, tensor in pairs if tensor is not None and 0 in tensor.stride()), None)
    if name is not None and "single memory location" in str(error):
        raise RuntimeError(
            f"{call}: expected gradients whose entries lie apart in memory, got an expanded one at {name!r}. Set "
            "parameter.grad = parameter.grad.clone() first."
        ) from error


def bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that memory was written, which it cannot see: graphs must not use old values that they saved."""
    try:
        torch.autograd.graph.increment_version(tensors)  # leaves out tensors of inference mode, which have no version
    except RuntimeError:  # an older torch refuses them
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


ValueT = TypeVar("ValueT")


class LastFour(Generic[ValueT]):
    """What was made for the last four keys: in a run a few keys come again and again.

    >>> squares = LastFour()
    >>> squares.keep(3, 9), squares.find(3), squares.find(2)
    (9, 9, None)
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, ValueT]] = []  # most recent first

    def find(self, key: Any) -> ValueT | None:
        """Return the value of a key, or None."""
        for place, (known, value) in enumerate(self._pairs):
            if known == key:
                if place:
                    self._pairs.insert(0, self._pairs.pop(place))
                return value
        return None

    def keep(self, key: Any, value: ValueT) -> ValueT:
        """Keep the value of a key that was not found, and return it."""
        self._pairs = [(key, value), *self._pairs[:3]]
        return value

    def clear(self) -> None:
        """Forget all."""
        self._pairs.clear()


Signature = list[tuple[torch.dtype, tuple[int, ...]] | None]
"""The dtype and strides of each tensor; None: not addressed."""


def addressed(tensors: Sequence[Tensor | None], signature: Signature) -> list[Tensor]:
    """Return the tensors that are read and written by address."""
    return [t for t, entry in zip(tensors, signature, strict=True) if t is not None and entry]


def only(tensors: Sequence[Tensor | None], wanted: tuple[int, ...]) -> list[Tensor | None]:
    """Return the tensors with None in the place of those that are not wanted."""
    return [tensor if t in wanted else None for t, tensor in enumerate(tensors)]


class AddressKernel(Kernel, Generic[ValueT]):
    """A kernel that reads tensors by address, and has the eager kernel for those that are not addressable.

    A backend derives from it, and defines `_serves` and `_make`: what its programs need of a plan over tensors of one
    signature, its *tables*. It keeps in ``_measured`` the tensors that it measured last, with their tables.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._warned = False
        self._eager: Kernel | None = None
        self._known: LastFour[ValueT] = LastFour()  # gradients and weights, few layouts in a run
        self._measured: tuple[list[Tensor | None], ValueT] | None = None

    @abstractmethod
    def _serves(self, dtype: torch.dtype) -> bool:
        """Whether the programs read and write a dtype."""

    @abstractmethod
    def _make(self, signature: Signature, eager_T: tuple[int, ...]) -> ValueT:
        """Return the tables for tensors of a signature; the eager kernel serves those at ``eager_T``."""

    @property
    def eager(self) -> Kernel:
        """The kernel for tensors that are not addressable, and for steps that are traced."""
        self._make_eager()
        assert self._eager is not None
        return self._eager

    @constant_while_traced
    def _make_eager(self) -> bool:
        """Make it on first use; while a step is traced this runs at once and leaves nothing in the graph."""
        if self._eager is None:
            self._eager = BACKENDS["eager"].make(self.plan, self.device)
        return True

    def _tables_of(self, tensors: Sequence[Tensor | None]) -> ValueT:
        """The tables for tensors of these dtypes and strides, made anew or found among the last four."""
        signature: Signature = []
        odd = []
        for t, tensor in enumerate(tensors):
            if tensor is None:
                signature.append(None)
            elif not obstacle(tensor, self.device.type) and self._serves(tensor.dtype):
                signature.append((tensor.dtype, tensor.stride()))
            else:
                signature.append(None)
                odd += [t] if tensor.numel() else []
        found = None if odd else self._known.find(signature)
        if found is not None:
            return found
        used = list(signature)
        for t, (tensor, entry) in enumerate(zip(tensors, signature, strict=True)):
            if tensor is not None and entry is not None and not tensor.numel():
                used[t] = None
            elif entry is not None and not is_addressable(self.plan, t, entry[1]):
                used[t] = None
                odd.append(t)
        for t in odd:
            self._warn(t, tensors[t])
        made = self._make(used, tuple(odd))
        # What is wrong with a tensor may change from step to step.
        return made if odd else self._known.keep(signature, made)

    def _warn(self, t: int, tensor: Tensor | None) -> None:
        """Warn of the first tensor that the eager kernel serves and is not made for."""
        if self._warned or tensor is None or tensor.is_sparse or tensor.is_complex():
            return
        reason = obstacle(tensor, self.device.type) or (
            f"its strides {tensor.stride()} have no contiguous rows that the plan could cut"
            if self._serves(tensor.dtype)
            else f"its dtype is {tensor.dtype}"
        )
        self._warned = True
        warn_of_fallback(f"The {self.name} backend", self.plan.layout.names[t], reason, remedy_of(reason))

    def _just_measured(self, tensors: Sequence[Tensor | None]) -> ValueT | None:
        """The tables of the tensors that were measured just before, once: their strides may change afterwards."""
        measured, self._measured = self._measured, None
        if measured is None or len(measured[0]) != len(tensors) or not all(map(operator.is_, measured[0], tensors)):
            return None
        return measured[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": LastFour(), "_measured": None, "_eager": None}
