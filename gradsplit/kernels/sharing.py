# mypy: disable-error-code="no-untyped-def"
"""Chunks of work shared among threads inside compiled code: each thread takes the next chunk until none is left.

The threads are torch's own: its OpenMP team is entered by the address of ``GOMP_parallel``, which workers that wait for
torch's next loop follow at once. A team of one, or a system without that function, runs the same code on the caller's
thread.
"""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["COUNT", "ENTRY", "NEXT", "THREADS", "share"]

NEXT, COUNT, THREADS, ENTRY = range(4)
"""What ``work`` holds: the next chunk, threads that have begun, threads to use, the address of GOMP_parallel or 0."""

ir: Any = vars(cgutils)["ir"]  # llvmlite's, as numba itself uses it
_intrinsic: Any = intrinsic
_I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_BODY = ir.FunctionType(ir.VoidType(), [_BYTES])
_PARALLEL = ir.FunctionType(ir.VoidType(), [_BODY.as_pointer(), _BYTES, _I32, _I32])


@_intrinsic
def share(typing_context, chunk, work, arguments):
    """Call ``chunk(c, worker, *arguments)`` once for every chunk c of a table.

    ``chunk`` is a compiled function that returns nothing and raises nothing; ``worker`` counts the threads that take
    part, from 0. The third of the arguments holds the chunks' bounds, one more than there are chunks. ``work`` is an
    array of four integers, see `NEXT`; several threads may enter with the same one.
    """
    inner = (types.int64, types.int64, *arguments.types)
    chunk.get_call_type(typing_context, inner, {})  # compiles it
    signature = types.void(chunk, work, arguments)

    def generate(ctx, builder, sig, args):
        compiled = chunk.dispatcher.overloads[inner]
        ctx.active_code_library.add_linking_library(compiled.library)
        shared = ctx.make_array(sig.args[1])(ctx, builder, args[1]).data
        bounds = ctx.make_array(arguments.types[2])(ctx, builder, builder.extract_value(args[2], 2))
        num_chunks = builder.sub(bounds.nitems, _I64(1))
        data = cgutils.pack_struct(builder, (shared, num_chunks, args[2]))
        place = cgutils.alloca_once_value(builder, data)
        body = _body(ctx, builder.module, compiled.fndesc, inner, data.type)
        entry, threads = (builder.load(_at(builder, shared, what)) for what in (ENTRY, THREADS))
        opaque = builder.bitcast(place, _BYTES)
        with builder.if_else(builder.icmp_signed("==", entry, _I64(0))) as (alone, together):
            with alone:
                builder.call(body, [opaque])
            with together:
                parallel = builder.inttoptr(entry, _PARALLEL.as_pointer())
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
    worker = builder.atomic_rmw("add", _at(builder, work, COUNT), _I64(1), "monotonic")
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
