"""The share step by Triton programs is the definition's in Triton's interpreter, and compiles for cards."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from gradsplit.optim.directions import orthogonalised, product_dtype
from tests.kernels.interpreter import compiled, found_by
from tests.optim.share.triton_runs import COUNTS, EQUAL, FALLBACKS, FAULTS, LAWS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no build for this system")

_COMPILE = """
import sys
import triton.language as tl, triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradsplit.optim.updates import share_programs as programs
targets = [(GPUTarget("cuda", 80, 32), "ptx"), (GPUTarget("cuda", 90, 32), "ptx")]
if "amd" in backends:
    targets.append((GPUTarget("hip", "gfx942", 64), "hsaco"))
kind = tl.bfloat16
numbers = {"KIND": kind, "WIDE": tl.float32, "NARROW": kind, "BLOCK": programs.BLOCK, "LINES": 2, "MEASURES": True}
pointers = {"table": "*i64", "addresses": "*i64", "tensors": "*i64", "moved": "*i8"}
for name in ("measure", "decide", "enter", "commit"):
    program = getattr(programs, name)
    for plain, adam in ((True, False), (False, True)):
        given = {**numbers, "PLAIN": plain, "ADAM": adam}
        sizes = {"num_tensors": "i32", "num_bins": "i32"}
        types = {
            n: "constexpr" if n in given else sizes.get(n) or pointers.get(n, "*fp64") for n in program.arg_names
        }
        constants = {(i,): given[n] for i, n in enumerate(program.arg_names) if n in given}
        source = ASTSource(program, types, constexprs=constants)
        for target, made in targets:
            assert made in triton.compile(source, target=target).asm
        if "PLAIN" not in program.arg_names:
            break
print("compiled")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by("tests.optim.share.triton_runs", tmp_path_factory.mktemp("programs"))


@needs_triton
@pytest.mark.parametrize("name", EQUAL)
def test_weights_memories_and_decision_are_those_of_the_definition(found, name):
    assert found[f"equal: {name}"] == ""


@needs_triton
@pytest.mark.parametrize("name", LAWS)
def test_the_laws_hold_for_every_kind_of_tensor(found, name):
    assert found[f"law: {name}"] == ""


@needs_triton
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_programs_cannot_do_is_the_definitions_with_one_warning(found, name):
    said = found[f"fallback: {name}"]
    assert said.startswith(f"GSO's Triton step falls back to eager torch for {FALLBACKS[name][1]}")
    assert "|" not in said, "the warning comes once"


@needs_triton
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(found, name):
    assert found[f"fault: {name}"].startswith("step ")


@needs_triton
def test_a_wrong_program_is_found_out_before_the_first_step(found):
    raised, _, warned = found["caught by itself"].partition(" || ")
    assert raised.startswith("program 'triton: share step' on cpu, torch.float32: ")
    assert raised.endswith("Use backend='auto', which takes eager torch there.")
    assert "the definition's" in warned and "falls back to eager torch" in warned


@needs_triton
@pytest.mark.parametrize("where", ["orthogonalised", "_decide"])
def test_a_step_in_which_memory_runs_out_leaves_everything_as_it_was(found, where):
    assert found[f"survives: {where}"] == ""


@needs_triton
@pytest.mark.parametrize("name", COUNTS)
def test_a_step_takes_few_launches_and_reads_nothing_back(found, name):
    """The GPT has matrices of four shapes; a card adds nothing. Thirty are for layers in series, and for vectors."""
    seen = json.loads(found[f"count: {name}"])
    assert sum(seen.values()) <= 75 + 20 * 4, seen
    assert sum(number for key, number in seen.items() if key.startswith("triton")) <= 8
    assert not [key for key in seen if any(word in key for word in ("local_scalar", "nonzero", "equal"))]


@needs_triton
def test_the_programs_compile_for_graphics_cards(tmp_path):
    assert compiled(_COMPILE, tmp_path) == ["compiled"]


@pytest.mark.parametrize(("major", "wanted"), [(9, torch.bfloat16), (8, torch.bfloat16), (7, torch.float32)])
def test_a_card_without_bfloat16_multiplies_in_float32(monkeypatch, major, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    card = torch.device("cuda", 0)
    assert product_dtype(torch.float32, card) == wanted
    assert product_dtype(torch.float64, card) == torch.float64
    assert product_dtype(torch.complex64, card) == torch.complex64


def _cosines(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
@pytest.mark.parametrize(("spread", "usual", "most"), [(0.0, 2, 8), (3.0, 8, 25)], ids=["alike", "three decades"])
def test_products_in_bfloat16_turn_rows_by_a_few_degrees(shape, spread, usual, most):
    """The dtype of Newton-Schulz on a card; lengths are free, since each row moves by its share."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *shape, generator=generator)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.logspace(0, -spread, s.shape[-1]) @ v if spread else x
    cosines = _cosines(orthogonalised(x.bfloat16()), orthogonalised(x))
    degrees = torch.rad2deg(torch.arccos(cosines.clamp(max=1)))
    print(float(degrees.median()), float(degrees.max()))
    assert float(degrees.median()) < usual and float(degrees.max()) < most


def test_products_in_a_quarter_of_the_digits_would_be_told_apart():
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    coarse = (x * 8).round() / 8  # three bits
    cosines = _cosines(orthogonalised(coarse), orthogonalised(x))
    assert float(torch.rad2deg(torch.arccos(cosines.clamp(max=1))).median()) > 2
