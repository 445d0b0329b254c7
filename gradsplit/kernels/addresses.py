# mypy: disable-error-code="no-untyped-def"
"""Memory by address for Numba: pointers typed by the tensor's dtype, loads and stores that round as torch does.

Numba has no half-precision types on the CPU. So each loop receives a *kind*, a number of value 0 whose type says how to
read memory: float32 and float64 as they are, uint16 for bfloat16, int16 for float16. One text of a loop then serves all
four. Half-precision numbers are loaded as float32, which holds them exactly, and rounded to nearest even when they are
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import extending
from numba.core import cgutils, types

__all__ = ["KINDS", "compiled", "intrinsic", "ir", "load", "narrow", "pointer", "store"]

KINDS: dict[torch.dtype, np.generic] = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
}
"""The kind of each dtype."""

ir: Any = vars(cgutils)["ir"]  # llvmlite's, as numba itself uses it
intrinsic: Any = extending.intrinsic
_BF16, _F16 = types.uint16, types.int16


def compiled(**flags: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return numba's decorator for serial loops without the GIL, cached on disk where a folder can be written.

    With a read-only install and no writable home there is no cache, and every process compiles the loops again. Numba
    renews a loop's cache when the loop's own file changes: whoever edits an intrinsic of this file, or the columns of
    the tables in `gradsplit.plan.lowering`, deletes the cached loops.

    Args:
        **flags: for `numba.njit`, such as ``fastmath``.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(function, nogil=True, cache=True, error_model="numpy", **flags)
        except RuntimeError:  # "no locator available"
            return numba.njit(function, nogil=True, error_model="numpy", **flags)

    return wrap


@intrinsic
def pointer(context, address, kind):
    """Return the address as a pointer to elements of the kind."""
    signature = types.CPointer(kind)(address, kind)

    def generate(ctx, builder, sig, args):
        return builder.inttoptr(args[0], ctx.get_value_type(sig.return_type))

    return signature, generate


@intrinsic
def load(context, memory, index):
    """Return element ``index`` in the type in which to compute: float64 for float64, else float32."""
    kind = memory.dtype
    signature = (types.float64 if kind == types.float64 else types.float32)(memory, index)

    def generate(ctx, builder, sig, args):
        value = builder.load(builder.gep(args[0], [args[1]], inbounds=True))
        if kind == _BF16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if kind == _F16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return signature, generate


@intrinsic
def store(context, memory, index, value):
    """Write a number at element ``index``, rounded to the memory's dtype; NaN stays NaN."""
    kind = memory.dtype
    compute = types.float64 if kind == types.float64 else types.float32
    signature = types.void(memory, index, compute)

    def generate(ctx, builder, sig, args):
        value = args[2]
        if kind == _BF16:
            value = _rounded_bf16(builder, value)
        elif kind == _F16:
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        builder.store(value, builder.gep(args[0], [args[1]], inbounds=True))
        return ctx.get_dummy_value()

    return signature, generate


def _rounded_bf16(builder: Any, value: Any) -> Any:
    """The upper half of a float32, rounded to nearest even; one quiet NaN for all NaN, as in torch."""
    i16, i32 = ir.IntType(16), ir.IntType(32)
    bits = builder.bitcast(value, i32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF)))
    half = builder.trunc(builder.lshr(rounded, ir.Constant(i32, 16)), i16)
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, ir.Constant(i16, 0x7FC0), half)


@intrinsic
def narrow(context, memory, value):
    """Return a float64 in the type in which to compute with the memory's elements, see `load`."""
    compute = types.float64 if memory.dtype == types.float64 else types.float32
    signature = compute(memory, types.float64)

    def generate(ctx, builder, sig, args):
        return args[1] if compute == types.float64 else builder.fptrunc(args[1], ir.FloatType())

    return signature, generate
