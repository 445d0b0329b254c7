"""The deep convolution stacks: the table, the literal layout, the initialisation."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gradsplit.lab.task import seeded
from gradsplit.lab.workloads import deep_stack
from gradsplit.lab.workloads.deep_stack import build_deep_stack, literal_layout, read_table
from gradsplit.lab.workloads.stacks import build_plain_stack, build_residual_stack, he_


def table() -> list[dict[str, str]]:
    path = Path(deep_stack.__file__).with_name("deep_stack.csv")
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_the_table_has_146_joined_convolutions_and_four_pools() -> None:
    rows = read_table()
    convs = [row for row in rows if not row.is_pool]
    assert len(rows) == 150 and len(convs) == 146
    assert convs[0].channels_in == 3 and convs[-1].channels_out == 1340088619048
    assert all(a.channels_out == b.channels_in for a, b in itertools.pairwise(convs))
    after = [rows[n - 1].name for n, row in enumerate(rows) if row.is_pool]
    assert after == ["conv4", "conv10", "conv16", "conv24"]


def test_the_literal_layout_counts_in_integers_that_do_not_overflow() -> None:
    shapes = literal_layout()
    convs = [row for row in table() if row["kind"] == "conv2d"]
    expected = sum(9 * int(row["channels_in"]) * int(row["channels_out"]) for row in convs)
    weights = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 4)
    assert weights == expected and 1.08e27 < weights < 1.10e27
    assert max(math.prod(shape) for shape in shapes.values()) > 2**63
    assert all(isinstance(size, int) for shape in shapes.values() for size in shape)


def test_the_net_that_runs_has_the_names_of_the_literal_layout_and_capped_widths() -> None:
    model = build_deep_stack(0, max_channels=5).model
    shapes = literal_layout()
    assert [name for name, _ in model.named_parameters()] == list(shapes)
    for name, parameter in model.named_parameters():
        literal = shapes[name]
        if name == "body.conv1.weight":
            assert parameter.shape == (5, 3, 3, 3)
        elif name.startswith("body"):
            assert tuple(parameter.shape) == tuple(min(size, 5) for size in literal)


@pytest.mark.parametrize(("size", "pools"), [(8, 3), (16, 4), (32, 4)])
def test_a_pool_is_left_out_where_the_map_is_one_pixel(size: int, pools: int) -> None:
    task = build_deep_stack(0, max_channels=4, size=size, batch=2)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in task.model.body) == pools
    images, _ = task.batch(0)
    assert images.shape == (2, 1, size, size)
    assert task.model(images).shape == (2, 10)


def test_a_single_channel_still_reads_three_colours() -> None:
    model = build_deep_stack(0, max_channels=1).model
    assert model.body.conv1.weight.shape == (1, 3, 3, 3)
    assert model.body.conv2.weight.shape == (1, 1, 3, 3)


def test_bad_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"max_channels=0\): expected at least 1"):
        build_deep_stack(0, max_channels=0)
    with pytest.raises(ValueError, match=r"size=4\): expected at least 8"):
        build_deep_stack(0, size=4)


def test_he_initialisation_keeps_the_mean_square_of_a_rectified_signal() -> None:
    conv = nn.Conv2d(64, 512, 3)
    with seeded(0):
        he_(conv, 1.0)
        x = torch.randn(64, 64, 3, 3).relu()
        ratio = conv(x).square().mean() / (2 * x.square().mean())
        he_(conv, 3.0, taps=1)
    assert ratio.item() == pytest.approx(1.0, rel=0.05)
    assert conv.weight.std().item() == pytest.approx(3.0 * math.sqrt(2 / 64), rel=0.02)


def test_the_residual_stack_is_hot_by_design_and_finite() -> None:
    norms = {}
    for gain in (0.5, 3.0):
        task = build_residual_stack(0, gain=gain)
        task.loss(task.model, task.batch(0)).backward()
        grads = [p.grad.double().norm().item() for p in task.model.parameters()]
        norms[gain] = max(grads)
        assert all(math.isfinite(norm) for norm in grads)
        assert sum(isinstance(m, nn.Conv2d) for m in task.model.blocks.modules()) == 48
    assert norms[3.0] > 1e12 * norms[0.5]


def test_the_plain_stack_has_the_depth_asked_for() -> None:
    task = build_plain_stack(0, depth=36, channels=8)
    assert sum(isinstance(m, nn.Conv2d) for m in task.model.modules()) == 36
    assert task.model(task.batch(0)[0]).shape == (32, 10)
