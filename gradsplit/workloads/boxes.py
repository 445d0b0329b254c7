"""Boxes on a grid of cells: decoding, overlap, and mean average precision by pycocotools.

Boxes are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor

from gradsplit.workloads.task import MissingDataError


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of paired boxes, shapes (..., 4) to (...); a non-finite box overlaps nothing.

    >>> overlap(torch.tensor([0., 0., 2., 2.]), torch.tensor([1., 0., 3., 2.])).item()
    0.3333333432674408
    """
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b)]
    return torch.nan_to_num(inter / (areas[0] + areas[1] - inter).clamp(min=1e-9), nan=0.0)


def cell_centres(cells_y: int, cells_x: int, cell: float, device: torch.device) -> Tensor:
    """(cells_y, cells_x, 2) pixel centres (x, y) of a grid's cells."""
    y = (torch.arange(cells_y, device=device) + 0.5) * cell
    x = (torch.arange(cells_x, device=device) + 0.5) * cell
    return torch.stack([x[None, :].expand(cells_y, cells_x), y[:, None].expand(cells_y, cells_x)], dim=-1)


def suppress(boxes: Tensor, scores: Tensor, most: float = 0.5) -> Tensor:
    """Greedy suppression of doubles: keep the surest box, drop what overlaps it by more than `most`, repeat.

    Args:
        boxes: (found, 4) pixels.
        scores: (found,) confidence.
        most: intersection over union from which two boxes are the same find, whatever their classes.

    Returns:
        Indices of the boxes kept, surest first.

    >>> boxes = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 5.], [8., 8., 9., 9.]])
    >>> suppress(boxes, torch.tensor([.5, .9, .1])).tolist()
    [1, 2]
    """
    order = scores.argsort(descending=True, stable=True)
    doubles = (overlap(boxes[order][:, None], boxes[order][None]) > most).tolist()
    dropped = [False] * len(order)
    for i in range(len(order)):
        if not dropped[i]:
            dropped[i + 1 :] = [dropped[j] or doubles[i][j] for j in range(i + 1, len(order))]
    return order[[i for i, gone in enumerate(dropped) if not gone]]


def mean_average_precision(
    truth: list[tuple[Tensor, Tensor]], found: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[float, float]:
    """Mean average precision over IoU .50 to .95, and at .50, by pycocotools.

    Args:
        truth: for each image its boxes (objects, 4) and class numbers (objects,).
        found: for each image boxes (found, 4), class numbers (found,) and confidences (found,), all finite.

    Returns:
        (mAP, mAP50) in [0, 1]; 0 where nothing was found. At most 100 finds an image count.

    Raises:
        MissingDataError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingDataError(
            "mean_average_precision(): expected the package pycocotools, found none. "
            "Run: pip install pycocotools==2.0.11"
        ) from error
    annotations = [
        {"image_id": n, "category_id": k, "bbox": row, "area": row[2] * row[3], "iscrowd": 0}
        for n, (boxes, labels) in enumerate(truth)
        for row, k in zip(_corner_and_size(boxes), labels.tolist(), strict=True)
    ]
    finds = [
        {"image_id": n, "category_id": k, "bbox": row, "score": score}
        for n, (boxes, labels, scores) in enumerate(found)
        for row, k, score in zip(_corner_and_size(boxes), labels.tolist(), scores.tolist(), strict=True)
    ]
    if not finds or not annotations:
        return 0.0, 0.0
    # pycocotools takes an annotation's number 0 for "no match", so they are counted from 1.
    for number, entry in enumerate(annotations):
        entry["id"] = number + 1
    categories = sorted({int(k) for _, labels in truth for k in labels.tolist()})
    # It also reports its progress on standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": n} for n in range(len(truth))],
            "annotations": annotations,
            "categories": [{"id": k} for k in categories],
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(finds), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return max(0.0, float(evaluation.stats[0])), max(0.0, float(evaluation.stats[1]))


def _corner_and_size(boxes: Tensor) -> list[list[float]]:
    wide = boxes.detach().double().cpu()
    return torch.cat([wide[:, :2], wide[:, 2:] - wide[:, :2]], dim=1).tolist()
