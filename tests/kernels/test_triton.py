"""The Triton programs equal the definition in Triton's interpreter and compile for a card; none has run them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT

pytest.importorskip("triton", reason="needs the package triton: pip install triton")

# Triton decides between interpreter and compiler when it is imported, so the check has a process of its own.
_CHECK = """
import torch, gradsplit as gs
from gradsplit.kernels.reference import ReferenceKernel
from gradsplit.kernels.triton_gpu import TritonKernel
cpu = torch.device("cpu")
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    ours = [torch.randn(3, 70).to(dtype), torch.randn(9, 3).t().to(dtype), torch.randn(2500).to(dtype)]
    assert ours[1].stride() == (1, 3)
    truth = [t.clone() for t in ours]
    layout = gs.Layout.from_shapes({"a": (3, 70), "b": (3, 9), "c": (2500,)})
    for plan in (gs.xsp(layout), gs.xsp(layout, axis=1, parts=2), gs.whole(layout)):
        kernel, reference = TritonKernel(plan, cpu), ReferenceKernel(plan, cpu)
        torch.testing.assert_close(kernel.squares(ours), reference.squares(truth), rtol=1e-12, atol=0)
        scale = torch.linspace(0.5, 1.5, plan.num_bins, dtype=torch.float64).clamp(max=1.0)
        zero = torch.arange(plan.num_bins) == 1
        kernel.scale_(ours, scale, zero)
        reference.scale_(truth, scale, zero)
        for mine, true in zip(ours, truth, strict=True):
            # The interpreter rounds bfloat16 towards zero: one unit in the last place.
            rtol = {torch.float64: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-6)
            torch.testing.assert_close(mine, true, rtol=rtol, atol=0)
            mine.copy_(true)
print("equal")
"""

_COMPILE = """
import triton.language as tl, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradsplit.kernels import triton_gpu as programs
numbers = {"KIND": tl.bfloat16, "WIDE": tl.float32, "BLOCK": programs.BLOCK}
pointers = {"table": "*i64", "addresses": "*i64", "squares": "*fp64", "scale": "*fp64", "zero": "*i32"}
for program in (programs.square_pieces, programs.scale_pieces):
    types = {name: pointers.get(name, "constexpr") for name in program.arg_names}
    constants = {(i,): numbers[name] for i, name in enumerate(program.arg_names) if name in numbers}
    made = triton.compile(ASTSource(program, types, constexprs=constants), target=GPUTarget("cuda", 80, 32))
    assert "ptx" in made.asm
print("compiled")
"""


def test_equals_the_definition_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", _CHECK],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_the_programs_compile_for_a_graphics_card(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
