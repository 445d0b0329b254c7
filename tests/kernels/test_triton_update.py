"""GSO's Triton programs equal the definition in Triton's interpreter and compile for a card; none has run them."""

from __future__ import annotations

import pytest

from tests.kernels.interpreter import compiled, found_by
from tests.kernels.triton_runs import EQUAL, FALLBACKS, FAULTS

pytest.importorskip("triton", reason="Triton has no build for this system")

_COMPILE = """
import triton.language as tl, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradsplit.optim.updates import triton_gpu
program = triton_gpu.one_pass
for by_bin, kind, bounds in ((False, tl.bfloat16, 2), (True, tl.float32, 0)):
    names = program.arg_names
    types = {name: "*i64" if name in ("table", "addresses") else "*fp64" for name in names[:7]}
    numbers = (by_bin, bounds, bounds, kind, tl.float32, triton_gpu.BLOCK)
    constants = {(8 + i,): number for i, number in enumerate(numbers)}
    types |= {"num_tensors": "i32", **{name: "constexpr" for name in names[8:]}}
    made = triton.compile(ASTSource(program, types, constexprs=constants), target=GPUTarget("cuda", 80, 32))
    assert "ptx" in made.asm
print("compiled")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by("tests.kernels.triton_runs", tmp_path_factory.mktemp("programs"))


@pytest.mark.parametrize("name", EQUAL)
def test_weights_moments_and_decision_are_those_of_the_definition(found, name):
    assert found[f"equal: {name}"] == ""


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_one_program_a_bin_cannot_do_is_the_definitions_with_one_warning(found, name):
    said = found[f"fallback: {name}"]
    assert said.startswith(f"GSO's Triton update falls back to eager torch for {FALLBACKS[name][1]}")
    assert "|" not in said, "the warning comes once"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(found, name):
    assert found[f"fault: {name}"].startswith("step 0: ")


@pytest.mark.parametrize("name", ["read back", "read back, capturable"])
def test_a_step_reads_no_number_back_from_the_device(found, name):
    assert found[name] == ""


def test_the_self_check_tells_of_planted_faults(found):
    told = {name: said for name, said in found.items() if name.startswith("told: ")}
    assert len(told) == 4
    assert all("triton: fused update" in said and "the definition's" in said for said in told.values()), told


def test_the_check_of_readings_notices_one(found):
    assert "_local_scalar_dense" in found["read back by a look"]


def test_the_programs_compile_for_a_graphics_card(tmp_path):
    assert compiled(_COMPILE, tmp_path) == ["compiled"]
