"""A small dense detector: a convolutional trunk, a box head with exponentiated sizes, a class head.

Batch: (images (n, c, h, w), boxes (n, cells, cells, 4) pixels, labels (n, cells, cells) int64). A label equal to the
number of classes means background. Boxes are (x0, y0, x1, y1).

The box loss is in pixels, and sizes are exponentiated without a clamp. So its gradient with respect to the raw size t
grows as exp(2 t), and explodes after one step that is too long. That is why detection libraries clamp t, or take the
loss in logarithms. The gradients of the class head stay of order one, and any limit on the whole starves them.
"""

from __future__ import annotations

import contextlib
import io
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import Batch, MissingDataError, Task, evaluating, reject_unknown
from .scenes import Scenes


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
        most: above this intersection over union two boxes are the same find, even of different classes.

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


VARIANTS = ("two-tower", "shared-trunk")
CONFIDENCE_FLOOR = 0.05  # fainter predictions cannot move a mean average precision by much, but cost time


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, 1), nn.ReLU())


class Detector(nn.Module):
    """One prediction per cell of 8 x 8 pixels: four raw box numbers, and logits of the classes and background.

    He initialisation in the body; heads start at 0.01 times a normal, so that the first boxes are the anchors
    and the first class probabilities equal.

    Args:
        variant: "two-tower": a common stem, then a tower of two layers a head; "shared-trunk": the heads
            part at the last layer.
        channels_in: 1 for grey, 3 for colour.
        width: channels of the first stage; the later ones have twice as many.
        num_classes: without background.
    """

    def __init__(self, variant: str, channels_in: int, width: int, num_classes: int) -> None:
        super().__init__()
        reject_unknown("Detector", "variant", variant, VARIANTS)
        wide = 2 * width
        self.trunk = nn.Sequential(_stage(channels_in, width, 2), _stage(width, width, 2), _stage(width, wide, 2))
        tower = 2 if variant == "two-tower" else 0
        self.trunk.extend(_stage(wide, wide, 1) for _ in range(2 - tower))
        self.box_tower = nn.Sequential(*(_stage(wide, wide, 1) for _ in range(tower)))
        self.class_tower = nn.Sequential(*(_stage(wide, wide, 1) for _ in range(tower)))
        self.box_head = nn.Conv2d(wide, 4, 1)
        self.class_head = nn.Conv2d(wide, num_classes + 1, 1)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
                if name.endswith("head"):
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw boxes (n, cells, cells, 4) and logits (n, cells, cells, classes + 1)."""
        h = self.trunk(images)
        raw = self.box_head(self.box_tower(h)).permute(0, 2, 3, 1)
        return raw, self.class_head(self.class_tower(h)).permute(0, 2, 3, 1)


def decode(raw: Tensor, cell: int, anchor: float) -> Tensor:
    """Raw boxes (n, cells, cells, 4) to (cx, cy, w, h) in pixels.

    The centre is the cell's centre plus `cell` * (tx, ty); the size is `anchor` * exp(tw), exp(th), no clamp.

    >>> decode(torch.zeros(1, 1, 1, 4), 8, 12.0).tolist()
    [[[[4.0, 4.0, 12.0, 12.0]]]]
    """
    centres = cell_centres(raw.shape[1], raw.shape[2], cell, raw.device)
    return torch.cat([centres + cell * raw[..., :2], anchor * raw[..., 2:].exp()], dim=-1)


def to_corners(box: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x0, y0, x1, y1).

    >>> to_corners(torch.tensor([4., 5., 2., 4.])).tolist()
    [3.0, 3.0, 5.0, 7.0]
    """
    half = box[..., 2:] / 2
    return torch.cat([box[..., :2] - half, box[..., :2] + half], dim=-1)


def to_centres(box: Tensor) -> Tensor:
    """(x0, y0, x1, y1) to (cx, cy, w, h), the inverse of `to_corners`."""
    return torch.cat([(box[..., :2] + box[..., 2:]) / 2, box[..., 2:] - box[..., :2]], dim=-1)


class DetectorTask(Task):
    """Training and scoring of a `Detector`; subclasses say where batches come from.

    Args:
        model: the detector.
        seed: of weights and batches.
        cell: pixels per cell.
        anchor: pixels of a box whose raw size is zero.
        num_classes: without background, which is the label after the last class.
        healthy: the loss that does not explode.
    """

    def __init__(
        self, model: nn.Module, seed: int, *, cell: int, anchor: float, num_classes: int, healthy: bool
    ) -> None:
        super().__init__(model, seed)
        self.cell, self.anchor, self.num_classes, self.healthy = cell, anchor, num_classes, healthy

    @abstractmethod
    def draw(self, step: int) -> Batch:
        """Images, boxes and labels of `step`."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Class cross-entropy + box error over the cells that own an object.

        The cross-entropy is the mean over owned cells plus the mean over background cells. So the background, of which
        there is more, does not drown the classes. The box error is the mean square in pixels. With `healthy` it is
        the smooth L1 error in units of one cell, with sizes in logarithms, and nothing is exponentiated.
        """
        images, boxes, labels = batch
        raw, logits = model(images)
        owned = labels != self.num_classes
        # Sums over counts of at least one: a batch without objects must give zero, not 0/0.
        count = owned.sum().clamp(min=1)
        class_loss = F.cross_entropy(logits[owned], labels[owned], reduction="sum") / count
        class_loss = class_loss + F.cross_entropy(logits[~owned], labels[~owned])
        target = to_centres(boxes[owned])
        if not self.healthy:
            error = decode(raw, self.cell, self.anchor)[owned] - target
            return class_loss + error.square().sum() / (4 * count)
        centres = cell_centres(raw.shape[1], raw.shape[2], self.cell, raw.device)
        offset = (target[:, :2] - centres.expand(*raw.shape[:3], 2)[owned]) / self.cell
        encoded = torch.cat([offset, (target[:, 2:] / self.anchor).log()], dim=-1)
        return class_loss + F.smooth_l1_loss(raw[owned], encoded, reduction="sum") / (4 * count)

    def finds(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """What a model sees in images (n, c, h, w).

        Returns:
            Boxes (n, cells, cells, 4) as corners, probabilities (n, cells, cells, classes + 1), and for each image the
            finds without doubles: boxes (found, 4), class numbers, confidences, surest first.
        """
        with evaluating(model):
            parts = [model(part.to(self.device)) for part in images.split(64)]
        raw = torch.cat([part[0] for part in parts]).cpu()
        probability = torch.cat([part[1] for part in parts]).cpu().softmax(-1)
        corners = to_corners(decode(raw, self.cell, self.anchor))
        best, classes = probability[..., :-1].max(-1)
        found = []
        for n in range(len(raw)):
            sure = (best[n] > CONFIDENCE_FLOOR) & corners[n].isfinite().all(-1)
            kept = suppress(corners[n][sure], best[n][sure])
            found.append((corners[n][sure][kept], classes[n][sure][kept], best[n][sure][kept]))
        return corners, probability, found

    def score(self, model: nn.Module, scenes: Scenes) -> dict[str, float]:
        """Scores of `model` on `scenes`.

        Returns:
            "score": mean over all objects of IoU at the object's own cell x (class right there); "iou" and
            "class_accuracy", its two parts; "map" and "map50", mean average precision of everything found.
        """
        corners, probability, found = self.finds(model, scenes.images)
        classes = probability[..., :-1].argmax(-1)
        owned = scenes.labels != self.num_classes
        right = (classes[owned] == scenes.labels[owned]) & probability[owned].isfinite().all(-1)
        iou = overlap(corners[owned], scenes.boxes[owned])
        truth = [(scenes.boxes[n][owned[n]], scenes.labels[n][owned[n]]) for n in range(len(corners))]
        average, at_50 = mean_average_precision(truth, found)
        return {
            "score": float((iou * right).mean()),
            "iou": float(iou.mean()),
            "class_accuracy": float(right.float().mean()),
            "map": average,
            "map50": at_50,
        }
