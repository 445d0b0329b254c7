"""Plans: strategies by their definition, boxes that do not tile, names, and shapes that fit on no machine."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.lab.workloads.deep_stack import literal_layout
from gradsplit.plan import Boxes, Layout, Plan, make_plan

LAYOUT = Layout.from_shapes({"a.w": (4, 3), "a.b": (4,), "c": (), "d.none": (0, 2)})


def names(plan):
    return [each.name for each in plan.bins]


def test_rows():
    assert names(gs.xsp(LAYOUT)) == ["a.w[0:1]", "a.w[1:2]", "a.w[2:3]", "a.w[3:4]", "a.b", "c"]


def test_columns():
    assert names(gs.xsp(LAYOUT, axis=1))[:3] == ["a.w[:, 0:1]", "a.w[:, 1:2]", "a.w[:, 2:3]"]
    assert names(gs.xsp(LAYOUT, axis=1))[3:] == ["a.b[:, 0:1]", "a.b[:, 1:2]", "a.b[:, 2:3]", "a.b[:, 3:4]", "c"]


@pytest.mark.parametrize(("parts", "sizes"), [(1, [4]), (2, [2, 2]), (3, [1, 1, 2]), (4, [1] * 4), (9, [1] * 4)])
def test_parts_of_a_side(parts, sizes):
    plan = gs.xsp(Layout.from_shapes({"w": (4, 3)}), parts=parts)
    assert (plan.row_stop_K - plan.row_start_K).tolist() == sizes


def test_baselines():
    assert gs.whole(LAYOUT).num_bins == 1
    assert gs.whole(LAYOUT).bins[0].name == "a.w + a.b + c"
    assert names(gs.per_tensor(LAYOUT)) == ["a.w", "a.b", "c"]
    assert gs.whole(Layout.from_shapes(dict.fromkeys("abcd", (2,)))).bins[0].name == "all"


def test_the_tree_of_modules():
    layout = Layout.from_shapes({"enc.0.w": (2, 2), "enc.0.b": (2,), "enc.1.w": (2, 2), "head": (2,)})
    plan = gs.tree_sp(layout, inner="xsp")
    by_index = {node.index: node for node in plan.nodes}
    path = {
        node.name: by_index[node.parent].name if node.parent >= 0 else None
        for node in plan.nodes
        if node.level != "bin"
    }
    assert path == {
        "all": None,
        "enc": "all",
        "enc.0": "enc",
        "enc.1": "enc",
        "enc.0.w": "enc.0",
        "enc.0.b": "enc.0",
        "enc.1.w": "enc.1",
        "head": "all",
    }
    assert {level: len(plan.level_nodes(level)) for level in gs.plan.LEVELS} == {
        "root": 1,
        "module": 3,
        "tensor": 4,
        "bin": 6,
    }


def test_bins_can_be_asked_for_by_index_slice_and_from_the_end():
    plan = gs.xsp(LAYOUT)
    assert plan.bins[-1].name == "c"
    assert [each.name for each in plan.bins[4:]] == ["a.b", "c"]
    assert plan.bins[1].boxes[0].start == (1, 0)
    assert plan.bins[1].boxes[0].stop == (2, 3)
    with pytest.raises(IndexError, match="index 6 is out of range for 6 entries"):
        plan.bins[6]


def test_a_plan_survives_pickling_and_a_dictionary():
    for plan in (gs.xsp(LAYOUT), gs.tree_sp(LAYOUT, inner="xsp"), gs.whole(LAYOUT)):
        gs.project(plan, np.ones(plan.num_bins), np.ones(plan.num_nodes))  # fills what is kept per device
        for again in (pickle.loads(pickle.dumps(plan)), Plan.from_dict(plan.to_dict())):
            assert again.fingerprint == plan.fingerprint
            assert names(again) == names(plan)
            np.testing.assert_array_equal(again.parents_N, plan.parents_N)


def test_fingerprints_tell_partitions_apart():
    plans = [gs.whole(LAYOUT), gs.per_tensor(LAYOUT), gs.tree_sp(LAYOUT), gs.xsp(LAYOUT), gs.xsp(LAYOUT, axis=1)]
    assert len({plan.fingerprint for plan in plans}) == len(plans)


def test_describe_says_what_is_cut_into_how_many():
    text = gs.xsp(LAYOUT).describe()
    assert "6 bins over 4 tensors, 17 elements (68 bytes in float32)" in text
    assert "a.w" in text


def boxes(*rows):
    """Boxes from (tensor, row start, row stop, column start, column stop), one bin each."""
    columns = np.array(rows).T
    return Boxes.from_columns(*columns, np.arange(columns.shape[1]))


SQUARE = Layout.from_shapes({"w": (4, 4)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: boxes((0, 0, 3, 0, 4)), "got no box over row 3 at tensor 'w'"),
        (lambda: boxes((0, 0, 4, 0, 2)), "got no box over column 2"),
        (lambda: boxes((0, 0, 2, 0, 4), (0, 1, 4, 0, 4)), "got two boxes over row 1"),
        (lambda: boxes((0, 0, 2, 0, 4), (0, 2, 4, 0, 2)), "got no box over row 2, column 2"),
        (lambda: boxes((0, 0, 3, 0, 3), (0, 2, 4, 2, 4), (0, 0, 2, 3, 4), (0, 3, 4, 0, 2)), "two boxes over row 2"),
        (lambda: boxes((0, 0, 5, 0, 4)), "got a box outside the tensor"),
        (lambda: boxes((0, 0, 0, 0, 4), (0, 0, 4, 0, 4)), "got an empty box"),
        (lambda: boxes((1, 0, 4, 0, 4)), r"expected tensor indices in \[0, 1\), got one outside"),
        (lambda: Boxes.from_columns([0], [0], [4], [0], [4], [1]), "expected bins numbered 0 … B-1 without gaps"),
        (lambda: Boxes.from_columns([0], [0], [4], [0], [4], [-1]), "expected bins numbered 0 … B-1 without gaps"),
        (lambda: Boxes.from_columns([0], [0], [4], [0], [4], [2**62]), "expected bins numbered 0 … B-1 without gaps"),
    ],
)
def test_boxes_that_do_not_tile_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        Plan(SQUARE, make())


def test_boxes_out_of_order_are_refused():
    layout = Layout.from_shapes({"a": (1, 1), "b": (1, 1)})
    columns = [np.array(c) for c in ([1, 0], [0, 0], [1, 1], [0, 0], [1, 1], [0, 1])]
    with pytest.raises(ValueError, match="expected boxes sorted by tensor"):
        Plan(layout, Boxes(*columns))
    assert Plan(layout, Boxes.from_columns(*columns)).num_bins == 2


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: gs.xsp(LAYOUT, parts=0), ValueError, r"xsp\(parts=0\): expected parts >= 1 or None"),
        (lambda: gs.xsp(LAYOUT, parts=2.0), ValueError, r"xsp\(parts=2.0\): expected parts >= 1 or None"),
        (lambda: gs.xsp(LAYOUT, axis=2), ValueError, r"xsp\(axis=2\): expected 0 \(rows\) or 1 \(columns\)"),
        (
            lambda: gs.xsp(Layout.from_shapes({"w": (2**40, 2)})),
            ValueError,
            r"expected at most 134,217,728 bins, got 1,099,511,627,776, for which .* bytes. Pass parts=",
        ),
        (
            lambda: gs.xsp(Layout.from_shapes({"w": (2, 2**64)})),
            ValueError,
            "rows and columns below 2\\^63, got 2 x 18,446,744,073,709,551,616 at 'w'",
        ),
        (lambda: gs.per_tensor(Layout.from_shapes({"w": (2**63, 1)})), ValueError, "rows and columns below 2\\^63"),
        (
            lambda: gs.whole(Layout.from_shapes({"w": (0, 3)})),
            ValueError,
            "expected at least one element, got only empty",
        ),
        (
            lambda: gs.tree_sp(LAYOUT, inner="whole"),
            ValueError,
            "expected bins inside one tensor each, got a bin of several",
        ),
        (lambda: gs.tree_sp(LAYOUT, inner="lbf"), ValueError, "inner=lambda layout: lbf"),
        (lambda: gs.tree_sp(LAYOUT, inner="xps"), ValueError, "Did you mean 'xsp'"),
        (
            lambda: make_plan("xps", LAYOUT, call="f"),
            ValueError,
            r"f\(plan='xps'\): expected one of whole, per_tensor, xsp, lbf, tree_sp, got 'xps'. Did you mean 'xsp'\?",
        ),
        (
            lambda: make_plan(gs.xsp(SQUARE), LAYOUT, call="f"),
            ValueError,
            r"expected a plan of this model \(4 tensors, .*\), got one of another \(1 tensors, .*first difference: "
            r"'a.w' \(4, 3\) here, 'w' \(4, 4\) there\). Make the plan from layout_of\(model\)",
        ),
        (
            lambda: make_plan(7, LAYOUT, call="f"),
            TypeError,
            "expected a Plan, a strategy's name or a function, got int",
        ),
        (lambda: make_plan(lambda _: "xsp", LAYOUT, call="f"), TypeError, "a function that returns a Plan, got str"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def transformer_of_seven_billion():
    """Names and shapes of a decoder with 32 blocks of width 4096 and a vocabulary of 32,000: 6.7e9 parameters."""
    shapes = {"embed.weight": (32_000, 4096)}
    for i in range(32):
        for name in "qkvo":
            shapes[f"layers.{i}.attn.{name}.weight"] = (4096, 4096)
        for name in ("gate", "up"):
            shapes[f"layers.{i}.mlp.{name}.weight"] = (11_008, 4096)
        shapes[f"layers.{i}.mlp.down.weight"] = (4096, 11_008)
        shapes |= {f"layers.{i}.norm{j}.weight": (4096,) for j in (1, 2)}
    return Layout.from_shapes(shapes | {"norm.weight": (4096,), "head.weight": (32_000, 4096)})


@pytest.mark.parametrize("strategy", ["xsp", "tree_sp over rows", "per_tensor"])
def test_a_plan_of_seven_billion_parameters_takes_less_than_two_hundred_megabytes(strategy):
    layout = transformer_of_seven_billion()
    assert layout.num_elements == 6_738_415_616
    make = {"xsp": gs.xsp, "per_tensor": gs.per_tensor, "tree_sp over rows": lambda x: gs.tree_sp(x, inner="xsp")}
    tracemalloc.start()
    plan = make[strategy](layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.numel_B.sum() == 6_738_415_616
    assert peak <= 200e6, f"{peak / 1e6:.0f} MB"


def test_the_deep_stack_at_its_literal_widths_has_a_plan_without_overflow():
    layout = Layout.from_shapes(literal_layout())
    assert max(layout.numels) > 2**63
    assert layout.num_elements == sum(layout.numels) > 10**27
    for plan in (gs.per_tensor(layout), gs.xsp(layout, parts=64), gs.tree_sp(layout), gs.whole(layout)):
        assert plan.numel_B.sum() == pytest.approx(layout.num_elements, rel=1e-12)
        assert (plan.row_stop_K > plan.row_start_K).all()
        assert f"{4 * layout.num_elements:,} bytes in float32" in plan.describe()
    columns = gs.xsp(layout, parts=8, axis=1)
    assert columns.numel_B.sum() == pytest.approx(layout.num_elements, rel=1e-12)


def test_every_node_of_many_bins_can_be_named():
    plan = gs.tree_sp(Layout.from_shapes({f"m{i}.w": (500, 2) for i in range(8)}), inner="xsp")
    found = [node.name for node in plan.nodes if node.level == "bin"]
    assert len(found) == len(set(found)) == 4000
    assert set(found) == {each.name for each in plan.bins}


def test_a_convolution_is_cut_by_output_channels():
    model = nn.Conv2d(3, 5, 3)
    plan = gs.xsp(gs.layout_of(model))
    assert names(plan) == [*(f"weight[{i}:{i + 1}]" for i in range(5)), "bias"]
    assert plan.numel_B.tolist() == [27.0] * 5 + [5.0]
    assert isinstance(model.weight, torch.Tensor)
