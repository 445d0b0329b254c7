# mypy: disable-error-code="no-untyped-def"
"""Compiled loops that read and scale bins.

Each loop is two functions: one works through a chunk of a table, the other one shares out the chunks among threads.

Squares are added in float64 whatever the dtype, so float32 entries up to 3e38 do not overflow. The compiler may
reassociate the sum and nothing else: this keeps inf and NaN, and lets it use vectors.

The tables and the names of their columns are those of `gradsplit.plan.lowering`. ``bases`` (T,) are the addresses of
the tensors' first elements. ``columns_W`` is room for one number per column of memory and thread.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.core import cgutils, types

from ..plan.lowering import (
    BAND_CUT,
    BAND_LENGTH,
    BAND_NUM_CUTS,
    BAND_OFFSET,
    BAND_ROW_STEP,
    BAND_ROWS,
    BAND_SLOT,
    BAND_TENSOR,
    BIN,
    COUNT,
    LENGTH,
    OFFSET,
    ROW_STEP,
    ROWS,
    SLOT,
    STEP,
    TENSOR,
)
from .addresses import compiled, intrinsic, ir, load, narrow, pointer, store
from .threads import BEGUN, NEXT, TEAM, THREADS

__all__ = [
    "share",
    "bound_entries",
    "fold",
    "scale_bands",
    "scale_entries",
    "scales_alone",
    "square_bands",
    "square_entries",
    "touched",
]

BOUNDS = 2
"""Where among a chunk function's arguments, after ``c`` and ``worker``, the bounds of the chunks stand."""

SLOPE, FLOOR, ROOT = range(3)
"""The rows of a line in ``lines`` (J, 3, T), see `Kernel.bound_`."""

_I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_BODY = ir.FunctionType(ir.VoidType(), [_BYTES])
_PARALLEL = ir.FunctionType(ir.VoidType(), [_BODY.as_pointer(), _BYTES, _I32, _I32])


@intrinsic
def share(typing_context, chunk, work, arguments):
    """Call ``chunk(c, worker, *arguments)`` once for every chunk c of a table.

    ``chunk`` is a compiled function that returns nothing and raises nothing. ``worker`` is the number of the thread,
    counted from 0 among those that take part. The argument at `BOUNDS` holds the bounds of the chunks, one more than
    there are chunks. ``work`` is an array of four integers, see `threads.NEXT`; several threads may enter with the same
    one.
    """
    inner = (types.int64, types.int64, *arguments.types)
    chunk.get_call_type(typing_context, inner, {})  # compiles it
    signature = types.void(chunk, work, arguments)

    def generate(ctx, builder, sig, args):
        compiled = chunk.dispatcher.overloads[inner]
        ctx.active_code_library.add_linking_library(compiled.library)
        shared = ctx.make_array(sig.args[1])(ctx, builder, args[1]).data
        bounds = ctx.make_array(arguments.types[BOUNDS])(ctx, builder, builder.extract_value(args[2], BOUNDS))
        num_chunks = builder.sub(bounds.nitems, _I64(1))
        data = cgutils.pack_struct(builder, (shared, num_chunks, args[2]))
        place = cgutils.alloca_once_value(builder, data)
        body = _body(ctx, builder.module, compiled.fndesc, inner, data.type)
        team, threads = (builder.load(_at(builder, shared, what)) for what in (TEAM, THREADS))
        opaque = builder.bitcast(place, _BYTES)
        with builder.if_else(builder.icmp_signed("==", team, _I64(0))) as (alone, together):
            with alone:
                builder.call(body, [opaque])
            with together:
                parallel = builder.inttoptr(team, _PARALLEL.as_pointer())
                builder.call(parallel, [body, opaque, builder.trunc(threads, _I32), _I32(0)])
        return ctx.get_dummy_value()

    return signature, generate


def _at(builder: Any, work: Any, what: int) -> Any:
    return builder.gep(work, [_I64(what)], inbounds=True)


def _body(ctx: Any, module: Any, fndesc: Any, inner: tuple[Any, ...], data_type: Any) -> Any:
    """A function of C's calling convention that one thread runs: chunks until none is left."""
    body = ir.Function(module, _BODY, name=module.get_unique_name("share"))
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block("entry"))
    data = builder.load(builder.bitcast(body.args[0], data_type.as_pointer()))
    work, num_chunks, arguments = (builder.extract_value(data, i) for i in range(3))
    unpacked = [builder.extract_value(arguments, i) for i in range(len(inner) - 2)]
    worker = builder.atomic_rmw("add", _at(builder, work, BEGUN), _I64(1), "monotonic")
    function = ctx.declare_function(module, fndesc)
    again, found, done = (body.append_basic_block(name) for name in ("again", "found", "done"))
    builder.branch(again)
    builder.position_at_end(again)
    c = builder.atomic_rmw("add", _at(builder, work, NEXT), _I64(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", c, num_chunks), found, done)
    builder.position_at_end(found)
    ctx.call_conv.call_function(builder, function, types.none, inner, [c, worker, *unpacked])
    builder.branch(again)
    builder.position_at_end(done)
    builder.ret_void()
    return body


_reduced = compiled(fastmath={"reassoc", "contract"})
_plain = compiled()


@_reduced
def _square_row(memory, start, length):
    """The sum of squares of contiguous elements; a function of its own, since only then does LLVM see a plain loop."""
    total = 0.0
    for j in range(length):
        x = np.float64(load(memory, start + j))
        total += x * x
    return total


@_reduced
def _square_rows(memory, start, rows, row_step, length):
    total = 0.0
    for r in range(rows):
        total += _square_row(memory, start + r * row_step, length)
    return total


@_reduced
def _square_entries(c, worker, kind, entries, chunks, bases, slots):
    for e in range(chunks[c], chunks[c + 1]):
        slot, count, offset, step = entries[e, SLOT], entries[e, COUNT], entries[e, OFFSET], entries[e, STEP]
        rows, row_step, length = entries[e, ROWS], entries[e, ROW_STEP], entries[e, LENGTH]
        memory = pointer(bases[entries[e, TENSOR]], kind)
        for i in range(count):
            slots[slot + i] = _square_rows(memory, offset + i * step, rows, row_step, length)


@_plain
def square_entries(work, *arguments):
    """Write the sum of squares of each entry's bins to its slots."""
    share(_square_entries, work, arguments)


@_reduced
def _eight_squares(memory, at, step):
    """The sum of the squares of an element and of the seven below it."""
    x0, x1 = np.float64(load(memory, at)), np.float64(load(memory, at + step))
    x2, x3 = np.float64(load(memory, at + 2 * step)), np.float64(load(memory, at + 3 * step))
    x4, x5 = np.float64(load(memory, at + 4 * step)), np.float64(load(memory, at + 5 * step))
    x6, x7 = np.float64(load(memory, at + 6 * step)), np.float64(load(memory, at + 7 * step))
    return ((x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)) + ((x4 * x4 + x5 * x5) + (x6 * x6 + x7 * x7))


@_reduced
def _add_rows(memory, start, step, length, columns):
    """Add the squares of sixteen rows to the columns, which are thus read and written once instead of sixteen times."""
    for j in range(length):
        upper = _eight_squares(memory, start + j, step)
        store(columns, j, load(columns, j) + (upper + _eight_squares(memory, start + j + 8 * step, step)))


@_reduced
def _add_row(memory, start, length, columns):
    for j in range(length):
        x = np.float64(load(memory, start + j))
        store(columns, j, load(columns, j) + x * x)


@_reduced
def _square_bands(c, worker, kind, bands, chunks, stops, bases, slots, columns_W):
    sums = columns_W[worker]
    columns = pointer(sums.ctypes.data, 0.0)
    for d in range(chunks[c], chunks[c + 1]):
        offset, rows = bands[d, BAND_OFFSET], bands[d, BAND_ROWS]
        row_step, length = bands[d, BAND_ROW_STEP], bands[d, BAND_LENGTH]
        cut, num_cuts, slot = bands[d, BAND_CUT], bands[d, BAND_NUM_CUTS], bands[d, BAND_SLOT]
        memory = pointer(bases[bands[d, BAND_TENSOR]], kind)
        sums[:length] = 0.0
        whole = rows - rows % 16
        for r in range(0, whole, 16):
            _add_rows(memory, offset + r * row_step, row_step, length, columns)
        for r in range(whole, rows):
            _add_row(memory, offset + r * row_step, length, columns)
        lo = 0
        for i in range(num_cuts):
            total = 0.0
            for j in range(lo, stops[cut + i]):
                total += load(columns, j)
            slots[slot + i] = total
            lo = stops[cut + i]


@_plain
def square_bands(work, *arguments):
    """Add the squares of each band by columns over its rows, then the columns by cuts into its slots."""
    share(_square_bands, work, arguments)


@_plain
def fold(slots, num_bins, fold_bins):
    """Add the further slots to their bins, in order."""
    for i in range(len(fold_bins)):
        slots[fold_bins[i]] += slots[num_bins + i]


@_plain
def touched(scale, zero):
    """Whether any bin must be changed."""
    found = False
    for b in range(len(scale)):
        found |= zero[b] | (scale[b] < 1.0)
    return found


@_plain
def _zero_rows(memory, start, rows, row_step, length):
    for r in range(rows):
        for j in range(length):
            store(memory, start + r * row_step + j, narrow(memory, 0.0))


@_plain
def _multiply_rows(memory, start, rows, row_step, length, factor):
    for r in range(rows):
        for j in range(length):
            at = start + r * row_step + j
            store(memory, at, load(memory, at) * factor)


@_plain
def _scale_entries(c, worker, kind, entries, chunks, bases, scale, zero):
    for e in range(chunks[c], chunks[c + 1]):
        at, count, offset, step = entries[e, BIN], entries[e, COUNT], entries[e, OFFSET], entries[e, STEP]
        rows, row_step, length = entries[e, ROWS], entries[e, ROW_STEP], entries[e, LENGTH]
        memory = pointer(bases[entries[e, TENSOR]], kind)
        for i in range(count):
            if zero[at + i]:
                _zero_rows(memory, offset + i * step, rows, row_step, length)
            elif scale[at + i] < 1.0:
                _multiply_rows(memory, offset + i * step, rows, row_step, length, narrow(memory, scale[at + i]))


@_plain
def scale_entries(work, *arguments):
    """Multiply bins with a scale below 1, and write zeros where ``zero``; other bins are neither read nor written."""
    share(_scale_entries, work, arguments)


@_reduced
def _limit(lines, t, weight, numel):
    """The smallest ``max(slope * weight, floor + root * sqrt(numel))`` over the lines of tensor t, see `SLOPE`."""
    limit = np.inf
    for j in range(len(lines)):
        limit = min(limit, max(lines[j, SLOPE, t] * weight, lines[j, FLOOR, t] + lines[j, ROOT, t] * math.sqrt(numel)))
    return limit


@_reduced
def scales_alone(squares, weights, lines, tensors, numel, scale, zero):
    """Write each measured bin's scale and whether it must become zero; return whether any bin must be changed."""
    found = False
    for b in range(len(squares)):
        zero[b] = not math.isfinite(squares[b])
        weight = math.sqrt(weights[b]) if len(weights) and math.isfinite(weights[b]) else 0.0
        norm, limit = math.sqrt(squares[b]), _limit(lines, tensors[b], weight, numel[b])
        scale[b] = 0.0 if zero[b] else limit / norm if norm > limit else 1.0
        found |= scale[b] < 1.0
    return found


@_reduced
def _bound_entries(c, worker, kind, entries, chunks, bases, weight_bases, lines, squares, weights, touched):
    for e in range(chunks[c], chunks[c + 1]):
        at, count, offset, step = entries[e, BIN], entries[e, COUNT], entries[e, OFFSET], entries[e, STEP]
        t, rows, row_step, length = entries[e, TENSOR], entries[e, ROWS], entries[e, ROW_STEP], entries[e, LENGTH]
        memory, of_weights = pointer(bases[t], kind), pointer(weight_bases[t], kind)
        for i in range(count):
            b, start, weight = at + i, offset + i * step, 0.0
            square = _square_rows(memory, start, rows, row_step, length)
            squares[b] = square
            if len(weights):
                weights[b] = _square_rows(of_weights, start, rows, row_step, length)
                weight = math.sqrt(weights[b]) if math.isfinite(weights[b]) else 0.0
            if not math.isfinite(square):
                _zero_rows(memory, start, rows, row_step, length)
                touched[0] = 1
                continue
            norm, limit = math.sqrt(square), _limit(lines, t, weight, rows * length)
            if norm > limit:
                _multiply_rows(memory, start, rows, row_step, length, narrow(memory, limit / norm))
                touched[0] = 1


@_plain
def bound_entries(work, *arguments):
    """Measure each bin, and its weights if there is room for their squares; scale the bin at once if it is too long.

    A bin that is not finite becomes zero; weights that are not finite count as zero. ``touched[0]`` becomes 1 if
    anything was written.
    """
    share(_bound_entries, work, arguments)


@_plain
def _scale_row(memory, start, first, last, factors):
    for j in range(first, last):
        factor = narrow(memory, load(factors, j))
        x = load(memory, start + j)
        store(memory, start + j, x * factor if load(factors, j) != 0.0 else narrow(memory, 0.0))


@_plain
def _scale_bands(c, worker, kind, bands, chunks, stops, bins, bases, scale, zero, columns_W):
    factors = pointer(columns_W[worker].ctypes.data, 0.0)
    for d in range(chunks[c], chunks[c + 1]):
        offset, rows, row_step = bands[d, BAND_OFFSET], bands[d, BAND_ROWS], bands[d, BAND_ROW_STEP]
        cut, num_cuts = bands[d, BAND_CUT], bands[d, BAND_NUM_CUTS]
        memory = pointer(bases[bands[d, BAND_TENSOR]], kind)
        lo, first, last = 0, -1, 0
        for i in range(num_cuts):
            b = bins[cut + i]
            factor = 0.0 if zero[b] else min(1.0, scale[b])
            for j in range(lo, stops[cut + i]):
                store(factors, j, factor)
            if factor < 1.0:
                first = lo if first < 0 else first
                last = stops[cut + i]
            lo = stops[cut + i]
        if first < 0:
            continue
        for r in range(rows):
            _scale_row(memory, offset + r * row_step, first, last, factors)


@_plain
def scale_bands(work, *arguments):
    """Multiply bands as `scale_entries` does entries, by one factor per column; a band without a change is left out."""
    share(_scale_bands, work, arguments)
