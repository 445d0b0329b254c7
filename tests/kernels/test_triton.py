"""The Triton programs equal the definition in Triton's interpreter and compile for a card; none has run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT

pytest.importorskip("triton", reason="needs the package triton: pip install triton")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case of `tests.kernels.triton_programs` found; empty where all was as it should be."""
    folder = tmp_path_factory.mktemp("programs")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_programs", str(folder)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_programs_equal_the_definition_on_every_plan_and_memory_layout(found):
    of_plans = {name: said for name, said in found.items() if name.startswith("equal: ")}
    assert len(of_plans) >= 50
    assert not [f"{name}: {said}" for name, said in of_plans.items() if said]


def test_the_self_check_catches_every_planted_fault(found):
    planted = {name: said for name, said in found.items() if name.startswith("caught: ")}
    assert len(planted) >= 9
    assert not [f"{name}: {said}" for name, said in planted.items() if said]


def test_a_program_is_tried_once_per_dtype_and_process(found):
    assert not found["remembered"]


_COMPILE = """
import triton, triton.language as tl
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradsplit.kernels import triton_gpu as programs
pointers = {"table": "*i64", "addresses": "*i64", "squares": "*fp64", "scale": "*fp64", "zero": "*i32"}
targets = {"ptx": [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]}
if "amd" in backends:
    targets["hsaco"] = [GPUTarget("hip", "gfx942", 64)]
made = 0
for kind, wide in programs._KINDS.values():
    numbers = {"KIND": kind, "WIDE": wide, "BLOCK": programs.BLOCK}
    for program in (programs.square_pieces, programs.scale_pieces):
        types = {name: pointers.get(name, "constexpr") for name in program.arg_names}
        constants = {(i,): numbers[name] for i, name in enumerate(program.arg_names) if name in numbers}
        for binary, cards in targets.items():
            for card in cards:
                done = triton.compile(ASTSource(program, types, constexprs=constants), target=card)
                assert binary in done.asm, (program, card)
                made += 1
print("compiled", made, *targets)
"""


def test_the_programs_compile_for_graphics_cards(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    words = done.stdout.split()
    assert words[:1] == ["compiled"], done.stderr[-2000:]
    assert int(words[1]) == 8 * (3 if "hsaco" in words else 2)
