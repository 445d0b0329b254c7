"""The self-check: a fast program beside the definition on a small tensor, once per device, dtype and program.

A program that was never run on some card may be wrong there, or not compile. So it has to show once per process that it
computes what the definition computes, on the device where it is to work. What was found is remembered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .addressable import FallbackWarning

__all__ = ["ROUNDING", "SelfCheckError", "Trial", "findings", "forget", "is_sound"]

Trial = Callable[[], Iterable[tuple[str, Tensor, Tensor]]]
"""Runs a program and the definition; yields what was computed, the program's values and the definition's."""

ROUNDING: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-6,
}
"""The relative deviation per dtype of a result that is put down to rounding: two units of the half precisions."""

_FOUND: dict[tuple[str, str, torch.dtype], str] = {}  # (program, device, dtype) -> what is wrong; "" where nothing is


class SelfCheckError(RuntimeError):
    """A backend that was asked for by name does not compute what the definition computes."""


def is_sound(
    program: str,
    device: torch.device,
    dtype: torch.dtype,
    trial: Trial,
    *,
    by_name: bool = False,
    rounding: float | None = None,
) -> bool:
    """Whether a program computes on a device and in a dtype what the definition computes; found out once per process.

    The first call runs the trial and waits for the device; later ones look the answer up. Call it where a kernel is
    made, or before the first step in a dtype. While a CUDA graph is captured nothing can be tried, and where memory has
    run out nothing is learnt: the answer is then False, and the next call tries again.

    Args:
        program: its name, for example "triton: square_pieces". The answer holds for this name.
        device: where it runs. Cards of one name count as one device.
        dtype: of the tensors that it is to serve.
        trial: yields triples (what, found, wanted): what was computed, by the program and by the definition. Whatever
            it raises, an import error or a compiler's message, counts as a program that is wrong.
        by_name: the user asked for the backend by name: raise instead of falling back.
        rounding: the relative deviation that counts as rounding; None: that of `ROUNDING` for each result's dtype.

    Returns:
        False: use eager torch.

    Raises:
        SelfCheckError: the program is wrong, and ``by_name`` is set.

    Warns:
        FallbackWarning: the program is wrong; once, with the number found and the number wanted.

    >>> wrong = lambda: [("the sum", torch.tensor([3.0]), torch.tensor([4.0]))]
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     answers = [is_sound("example", torch.device("cpu"), torch.float32, wrong) for _ in range(2)]
    >>> answers, len(told)
    ([False, False], 1)
    >>> str(told[0].message)[:76]
    "program 'example' on cpu, torch.float32: the sum is 3.0 at 0, the definition"
    """
    key = (program, _kind_of(device), dtype)
    if key not in _FOUND:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            said = "it was not tried before this CUDA graph was captured. Run one step before the capture."
            return _answer(key, said, by_name)
        try:
            with warnings.catch_warnings(), torch.no_grad(), _waiting_allowed(device):
                warnings.simplefilter("ignore")  # numpy's, of the values that are not finite, in Triton's interpreter
                found = _difference(trial(), rounding)
        except torch.cuda.OutOfMemoryError:
            return False
        except Exception as error:  # whatever a compiler, a driver or an import may raise
            words = " ".join(str(error).split())
            found = f"it raised {type(error).__name__}: {words[:300]}"
        _FOUND[key] = found
        if found and not by_name:
            return _answer(key, found, by_name)
    found = _FOUND[key]
    return _answer(key, found, by_name) if found and by_name else not found


def findings() -> dict[tuple[str, str, torch.dtype], str]:
    """Return what is known so far, by (program, device, dtype): "" for a sound program, else what is wrong."""
    return dict(_FOUND)


def forget() -> None:
    """Forget all answers, so that every program is tried again."""
    _FOUND.clear()


def _answer(key: tuple[str, str, torch.dtype], found: str, by_name: bool) -> bool:
    program, device, dtype = key
    said = f"program {program!r} on {device}, {dtype}: {found}"
    if by_name:
        raise SelfCheckError(f"{said} Use backend='auto', which takes eager torch there.")
    warnings.warn(
        f"{said} From now on it falls back to eager torch, which is slower and has the definition's results. Please "
        "report this line.",
        FallbackWarning,
        stacklevel=5,
    )
    return False


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """A trial waits for the device, also where torch was told to raise at that."""
    if device.type != "cuda" or not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _kind_of(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def _difference(pairs: Iterable[tuple[str, Tensor, Tensor]], rounding: float | None) -> str:
    """Say where a program's values deviate most from the definition's; empty: nowhere beyond rounding."""
    for what, found, wanted in pairs:
        if found.shape != wanted.shape:
            return f"{what} has shape {tuple(found.shape)}, the definition's {tuple(wanted.shape)}."
        tiny = torch.finfo(wanted.dtype).tiny if wanted.dtype.is_floating_point else 0.0
        share = ROUNDING.get(wanted.dtype, 0.0) if rounding is None else rounding
        ours, truth = (value.detach().reshape(-1).to("cpu", torch.float64) for value in (found, wanted))
        same = (ours == truth) | (ours.isnan() & truth.isnan())
        excess = (ours - truth).abs() - (share * truth.abs() + tiny)
        excess = torch.where(same, -math.inf, excess.nan_to_num(nan=math.inf))
        if excess.numel() and float(excess.max()) > 0:
            i = int(excess.argmax())
            return f"{what} is {float(ours[i])!r} at {i}, the definition's {float(truth[i])!r}."
    return ""
