"""Boxes, composed scenes and aerial tiles against independent readings."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsplit.lab import MissingDataError
from gradsplit.lab.workloads import aerial
from gradsplit.lab.workloads.detection import CELL, SIZE, build_detection
from gradsplit.lab.workloads.detector import (
    cell_centres,
    decode,
    mean_average_precision,
    overlap,
    suppress,
    to_centres,
    to_corners,
)
from gradsplit.lab.workloads.digits import load_digits
from gradsplit.lab.workloads.scenes import BACKGROUND, compose

corner = st.integers(0, 20)
box = st.tuples(corner, corner, st.integers(1, 12), st.integers(1, 12)).map(
    lambda b: [float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3])]
)
many_boxes = st.lists(box, min_size=1, max_size=12)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(many_boxes, many_boxes)
def test_overlap_equals_pycocotools(first: list[list[float]], second: list[list[float]]) -> None:
    from pycocotools import mask

    a, b = torch.tensor(first), torch.tensor(second)
    sizes = [np.array([[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]) for boxes in (first, second)]
    oracle = mask.iou(sizes[0], sizes[1], [0] * len(second))
    assert torch.allclose(overlap(a[:, None], b[None]).double(), torch.from_numpy(np.asarray(oracle)), atol=1e-6)


def test_a_box_that_is_not_finite_overlaps_nothing() -> None:
    whole = torch.tensor([0.0, 0.0, 2.0, 2.0])
    for bad in (math.nan, math.inf):
        assert overlap(torch.tensor([0.0, 0.0, bad, bad]), whole).item() == 0.0


@settings(derandomize=True, max_examples=60, deadline=None)
@given(many_boxes)
def test_suppression_keeps_boxes_apart_and_drops_only_doubles(boxes: list[list[float]]) -> None:
    found = torch.tensor(boxes)
    scores = torch.linspace(0.1, 0.9, len(boxes))[torch.randperm(len(boxes), generator=torch.Generator())]
    kept = suppress(found, scores).tolist()
    assert sorted(kept, key=lambda i: -scores[i]) == kept
    for i in range(len(boxes)):
        surer = [k for k in kept if scores[k] > scores[i]]
        doubled = any(overlap(found[k], found[i]).item() > 0.5 for k in surer)
        assert doubled != (i in kept)


def test_mean_average_precision_is_one_for_the_truth_zero_for_nothing_and_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    boxes, labels = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 28.0]]), torch.tensor([0, 3])
    truth, sure = [(boxes, labels), (boxes[:1], labels[:1])], torch.tensor([0.9, 0.8])
    perfect = [(boxes, labels, sure), (boxes[:1], labels[:1], sure[:1])]
    assert mean_average_precision(truth, perfect) == pytest.approx((1.0, 1.0))
    # One of the two classes is never right.
    swapped = [(boxes, torch.tensor([0, 5]), sure), perfect[1]]
    assert mean_average_precision(truth, swapped) == pytest.approx((0.5, 0.5))
    # Overlap 0.7: found at .50, .55, .60, .65 and .70, five of the ten marks.
    wider = torch.tensor([[0.0, 0.0, 10.0, 7.0]])
    assert mean_average_precision([(boxes[:1], labels[:1])], [(wider, labels[:1], sure[:1])]) == pytest.approx(
        (0.5, 1.0)
    )
    nothing = [(boxes[:0], labels[:0], sure[:0])] * 2
    assert mean_average_precision(truth, nothing) == (0.0, 0.0)
    assert capsys.readouterr().out == ""


def test_missing_pycocotools_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(MissingDataError, match=r"pip install pycocotools==2\.0\.11"):
        mean_average_precision([], [])


def test_boxes_decode_around_their_cell_and_round_trip() -> None:
    raw = torch.zeros(1, 2, 3, 4)
    raw[0, 1, 2] = torch.tensor([0.5, -0.25, math.log(2.0), 0.0])
    decoded = decode(raw, 8, 10.0)
    assert torch.allclose(decoded[0, 1, 2], torch.tensor([24.0, 10.0, 20.0, 10.0]))
    assert torch.allclose(decoded[0, 0, 0], torch.tensor([4.0, 4.0, 10.0, 10.0]))
    assert torch.allclose(to_centres(to_corners(decoded)), decoded)
    assert cell_centres(2, 3, 8, torch.device("cpu"))[1, 2].tolist() == [20.0, 12.0]


def test_composed_scenes_are_tight_apart_and_owned_by_their_centre() -> None:
    images, labels, test_images, test_labels = load_digits()
    assert len(images) + len(test_images) == len(labels) + len(test_labels) == 1797
    scenes = compose(images, labels, count=40, size=SIZE, cell=CELL, max_objects=3, seed=5)
    again = compose(images, labels, count=40, size=SIZE, cell=CELL, max_objects=3, seed=5)
    assert torch.equal(scenes.images, again.images) and torch.equal(scenes.boxes, again.boxes)
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1
    for n in range(40):
        owned = scenes.labels[n] != BACKGROUND
        assert 1 <= int(owned.sum()) <= 3
        boxes = scenes.boxes[n][owned]
        apart = overlap(boxes[:, None], boxes[None]) - torch.eye(len(boxes))
        assert apart.abs().max() == 0
        outside = scenes.images[n, 0].clone()
        for x0, y0, x1, y1 in boxes.int().tolist():
            assert min(x1 - x0, y1 - y0) >= 8 and max(x1 - x0, y1 - y0) <= 16
            ink = scenes.images[n, 0, y0:y1, x0:x1]
            assert all(float(edge.max()) > 0 for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
            outside[y0:y1, x0:x1] = 0
        assert outside.abs().max() == 0
        rows, columns = torch.where(owned)
        for row, column, (x0, y0, x1, y1) in zip(rows.tolist(), columns.tolist(), boxes.tolist(), strict=True):
            assert int((y0 + y1) / 2 - 0.5 * ((y1 - y0) % 2)) // CELL == row
            assert int((x0 + x1) / 2 - 0.5 * ((x1 - x0) % 2)) // CELL == column


@pytest.mark.parametrize("healthy", [False, True])
@pytest.mark.parametrize("variant", ["two-tower", "shared-trunk"])
def test_detector_loss_equals_a_float64_loop(variant: str, healthy: bool) -> None:
    task = build_detection(0, variant=variant, healthy=healthy, width=4, batch=3)
    images, boxes, labels = task.batch(0)
    with torch.no_grad():
        raw, logits = (part.double() for part in task.model(images))
    inside, outside, errors = [], [], []
    for n, row, column in np.ndindex(3, SIZE // CELL, SIZE // CELL):
        surprise = -torch.log_softmax(logits[n, row, column], -1)[labels[n, row, column]].item()
        if labels[n, row, column] == BACKGROUND:
            outside.append(surprise)
            continue
        inside.append(surprise)
        x0, y0, x1, y1 = boxes[n, row, column].tolist()
        t = raw[n, row, column].tolist()
        centre = (CELL * (column + 0.5), CELL * (row + 0.5))
        if healthy:
            wanted = [((x0 + x1) / 2 - centre[0]) / CELL, ((y0 + y1) / 2 - centre[1]) / CELL]
            wanted += [math.log((x1 - x0) / CELL), math.log((y1 - y0) / CELL)]
            gaps = [abs(a - b) for a, b in zip(t, wanted, strict=True)]
            errors += [gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps]
        else:
            errors.append((centre[0] + CELL * t[0] - (x0 + x1) / 2) ** 2)
            errors.append((centre[1] + CELL * t[1] - (y0 + y1) / 2) ** 2)
            errors.append((CELL * math.exp(t[2]) - (x1 - x0)) ** 2)
            errors.append((CELL * math.exp(t[3]) - (y1 - y0)) ** 2)
    expected = sum(np.mean(part) for part in (inside, outside, errors))
    assert task.loss(task.model, (images, boxes, labels)).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_objects_has_a_finite_loss() -> None:
    task = build_detection(0, width=4, batch=2)
    images, boxes, labels = task.batch(0)
    empty = task.loss(task.model, (images, torch.zeros_like(boxes), torch.full_like(labels, BACKGROUND)))
    assert math.isfinite(empty.item())


def test_unknown_variant_is_an_error_that_lists_the_variants() -> None:
    with pytest.raises(ValueError, match=r"variant='tower'\): expected one of 'two-tower', 'shared-trunk'"):
        build_detection(0, variant="tower")


def test_the_four_photographs_have_951_boxes_inside_their_images() -> None:
    counts = {}
    for stem in (aerial.TRAIN, aerial.VALIDATION, aerial.TEST, aerial.UNUSED):
        boxes = aerial.read_boxes(stem)
        counts[stem] = len(boxes)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert len({tuple(b) for b in boxes.tolist()}) == len(boxes)
    assert list(counts.values()) == [574, 279, 61, 37] and sum(counts.values()) == 951
    image, boxes = aerial.photograph(aerial.VALIDATION)
    assert image.shape == (3, 517, 624) and image.min() >= -0.5 and image.max() <= 0.5
    assert boxes[:, 2].max() <= 624.5 and boxes[:, 3].max() <= 517.5


def test_tiles_hold_every_tree_whose_centre_they_hold() -> None:
    # No two centres share a cell there, so the grid of owners loses none: 17 lie in the margin.
    assert int((aerial.tiles(aerial.VALIDATION).labels == aerial.TREE).sum()) == 262
    assert int((aerial.tiles(aerial.TEST).labels == aerial.TREE).sum()) == 61


def test_an_example_holds_the_boxes_of_its_piece_in_the_photographs_own_pixels() -> None:
    task = aerial.build_aerial(0, width=4)
    with torch.no_grad():
        task.model.class_head.weight.zero_()
        task.model.class_head.bias.copy_(torch.tensor([5.0, 0.0]))  # every cell is sure of a tree
        task.model.box_head.weight.zero_()
    shown = task.example(task.model)
    wide, tall = shown["size"]
    assert (wide, tall) == (512, 256)
    height, width = (2 * side for side in aerial.photograph(aerial.VALIDATION)[0].shape[1:])
    corner = torch.tensor([(width - wide) // 4 * 2, (height - tall) // 4 * 2] * 2)
    boxes = aerial.read_boxes(aerial.VALIDATION) - corner
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    inside = (x >= 0) & (x < wide) & (y >= 0) & (y < tall)
    assert torch.allclose(torch.tensor(shown["truth"]), boxes[inside]) and int(inside.sum()) > 10
    found = torch.tensor(shown["found"])
    centres = (found[:, :2] + found[:, 2:4]) / 2
    assert len({tuple(c) for c in centres.tolist()}) == len(found) == int(inside.sum())
    area = [(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (boxes[inside], found)]
    low = torch.maximum(boxes[inside][:, None, :2], found[None, :, :2])
    high = torch.minimum(boxes[inside][:, None, 2:], found[None, :, 2:4])
    both = (high - low).clamp(min=0).prod(-1)
    assert shown["hit"] == int((both / (area[0][:, None] + area[1] - both) > 0.5).any(1).sum())
    assert torch.allclose(found[:, 2:4] - found[:, :2], torch.full((len(found), 2), 32.0), atol=1e-3)
    assert torch.allclose(centres % 16, torch.full_like(centres, 8.0), atol=1e-3)


def test_a_tile_cuts_boxes_and_the_larger_keeps_a_shared_cell() -> None:
    image = torch.arange(3 * 80 * 80, dtype=torch.float32).view(3, 80, 80)
    boxes = torch.tensor([[6.0, 10.0, 30.0, 30.0], [16.0, 18.0, 20.0, 22.0], [70.0, 70.0, 90.0, 90.0]])
    tile, grid, labels = aerial.cut(image, boxes, 10, 4)
    assert torch.equal(tile, image[:, 4:68, 10:74])
    assert int((labels == aerial.TREE).sum()) == 1
    assert labels[2, 1] == aerial.TREE and grid[2, 1].tolist() == [0.0, 6.0, 20.0, 26.0]


@pytest.mark.parametrize("turn", list(itertools.product([False, True], repeat=3)))
def test_a_turned_tile_keeps_its_boxes_on_their_trees(turn: tuple[bool, bool, bool]) -> None:
    image, boxes = torch.zeros(3, 64, 64), torch.tensor([[5.0, 10.0, 20.0, 50.0]])
    image[:, 10:50, 5:20] = 1.0
    image, boxes = aerial.turned(image, boxes, *turn)
    x0, y0, x1, y1 = boxes[0].int().tolist()
    assert image[:, y0:y1, x0:x1].min() == 1.0 and image.sum() == 3 * 15 * 40 == 3 * (x1 - x0) * (y1 - y0)


def test_missing_photographs_are_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aerial.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match=r"pip install --no-deps deepforest==2\.1\.0") as error:
        aerial.read_boxes(aerial.TEST)
    assert "read_boxes('OSBS_029')" in str(error.value)
    with pytest.raises(MissingDataError, match="pip install --no-deps deepforest"):
        aerial.read_image(aerial.TEST)


def test_missing_pillow_and_scikit_learn_are_errors_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDataError, match="pip install pillow"):
        aerial.read_image(aerial.TEST)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDataError, match="pip install scikit-learn"):
        load_digits.__wrapped__()
