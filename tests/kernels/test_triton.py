"""The Triton programs equal the definition in Triton's interpreter and compile for a card; none has run them."""

from __future__ import annotations

import pytest

from tests.kernels.interpreter import compiled, found_by
from tests.kernels.launches import SPLITTERS

pytest.importorskip("triton", reason="Triton has no build for this system")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case of `tests.kernels.triton_programs` found; empty where all was as it should be."""
    return found_by("tests.kernels.triton_programs", tmp_path_factory.mktemp("programs"))


def test_the_programs_equal_the_definition_on_every_plan_and_memory_layout(found):
    of_plans = {name: said for name, said in found.items() if name.startswith("equal: ")}
    assert len(of_plans) >= 50
    assert not [f"{name}: {said}" for name, said in of_plans.items() if said]


def test_the_self_check_catches_every_planted_fault(found):
    planted = {name: said for name, said in found.items() if name.startswith("caught")}
    assert len(planted) >= 20
    assert not [f"{name}: {said}" for name, said in planted.items() if said]


def test_the_programs_decide_as_the_definition_does(found):
    decided = {name: said for name, said in found.items() if name.startswith("decides: ")}
    assert len(decided) >= 17
    assert not [f"{name}: {said}" for name, said in decided.items() if said]


@pytest.mark.parametrize("which", [which for which in SPLITTERS if which != "nearest"])
def test_a_warm_step_makes_few_launches(found, which):
    """Launches of programs and operations of torch together; "nearest" sorts, which torch does."""
    programs, plus, operations, *_ = found[f"launches: {which}"].split()
    assert plus == "+", found[f"launches: {which}"]
    assert 3 <= int(programs) + int(operations) <= 12


def test_gradients_that_move_are_found_and_addresses_beyond_32_bits_are_right(found):
    assert not found["moved"]
    assert not found["beyond 2^31"]


def test_a_card_without_bfloat16_serves_the_other_dtypes(found):
    assert not found["without bf16"]


def test_a_program_is_tried_once_per_dtype_and_process(found):
    assert not found["remembered"]


_COMPILE = """
import torch, triton, triton.language as tl
import gradsplit as gs
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradsplit.budget import budgets_by_level, terms_of
from gradsplit.programs import formula_of
from gradsplit.kernels import triton_decide, triton_gpu as programs

pointers = {"table": "*i64", "addresses": "*i64", "others": "*i64", "zero": "*u8", "zeros": "*u8"}
whole = ("num_slots", "num_bins", "num_blocks", "pace_step", "reach_step")
targets = {"ptx": [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]}
if "amd" in backends:
    targets["hsaco"] = [GPUTarget("hip", "gfx942", 64)]
made = 0

def build(program, numbers):
    global made
    names = program.arg_names
    types = {n: "constexpr" if n in numbers else "i32" if n in whole else pointers.get(n, "*fp64") for n in names}
    constants = {(i,): numbers[n] for i, n in enumerate(names) if n in numbers}
    for binary, cards in targets.items():
        for card in cards:
            done = triton.compile(ASTSource(program, types, constexprs=constants), target=card)
            assert binary in done.asm, (program, card)
            made += 1

for kind, wide in programs.KINDS.values():
    build(programs.square_pieces, {"KIND": kind, "BLOCK": 256})
    build(programs.scale_pieces, {"KIND": kind, "WIDE": wide, "BLOCK": programs.BLOCK})
build(programs.add_slots, {"BLOCK": programs.BLOCK})
plan = gs.xsp(gs.Layout.from_shapes({"w": (4, 3)}))
like = torch.zeros(4, dtype=torch.float64)
sets = [{"bin": gs.Ema(), "root": gs.Ema(2.0)}, {"bin": (gs.ZScore(), gs.Percentile()), "root": gs.Ema()}]
for levels, collective in [(sets[0], False), (sets[1], False), ({"bin": gs.Relative(0.2)}, True), (sets[0], True)]:
    terms = terms_of(plan, budgets_by_level(levels, plan, call="f"), like, rule="bottom_up", call="f")
    decider = triton_decide.Decider(formula_of(terms, "bottom_up"), like + 1, like + 1, collective=collective)
    for name, text in decider.texts.items():
        build(triton_decide._program(name, text)[0], {"BLOCK": triton_decide.BINS})
print("compiled", made, *targets)
"""


def test_the_programs_compile_for_graphics_cards(tmp_path):
    words = compiled(_COMPILE, tmp_path)
    programs = 4 + 4 + 1 + 3 + 3 + 2 + 4  # of squares, of scaling, of slots; of four sets of budgets
    assert int(words[1]) == programs * (3 if "hsaco" in words else 2)
