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


def mean_average_precision(
    true_boxes: list[Tensor],
    true_labels: list[Tensor],
    boxes: list[Tensor],
    labels: list[Tensor],
    scores: list[Tensor],
) -> tuple[float, float]:
    """Mean average precision over IoU .50 to .95, and at .50, of boxes found in images.

    Args:
        true_boxes: for each image (objects, 4) pixels.
        true_labels: for each image (objects,) class numbers.
        boxes: for each image (found, 4) pixels.
        labels: for each image (found,) class numbers.
        scores: for each image (found,) confidence.

    Returns:
        (mAP, mAP50) in [0, 1]; 0 where nothing was found. Found boxes that are not finite are dropped.

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

    def rows(boxes_of: Tensor) -> list[list[float]]:
        wide = boxes_of.detach().double().cpu()
        return torch.cat([wide[:, :2], wide[:, 2:] - wide[:, :2]], dim=1).tolist()

    truth = [
        {"image_id": n + 1, "category_id": int(k) + 1, "bbox": row, "area": row[2] * row[3], "iscrowd": 0}
        for n in range(len(true_boxes))
        for row, k in zip(rows(true_boxes[n]), true_labels[n].tolist(), strict=True)
    ]
    found = [
        {"image_id": n + 1, "category_id": int(k) + 1, "bbox": row, "score": score}
        for n in range(len(boxes))
        for row, k, score in zip(rows(boxes[n]), labels[n].tolist(), scores[n].tolist(), strict=True)
        if all(abs(value) < 1e9 for value in (*row, score))
    ]
    if not found or not truth:
        return 0.0, 0.0
    for number, entry in enumerate(truth):
        entry["id"] = number + 1
    # pycocotools reports its progress on standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": n + 1} for n in range(len(true_boxes))],
            "annotations": truth,
            "categories": [{"id": k} for k in sorted({int(entry["category_id"]) for entry in truth})],
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return max(0.0, float(evaluation.stats[0])), max(0.0, float(evaluation.stats[1]))
