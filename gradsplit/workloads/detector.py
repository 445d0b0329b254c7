"""A small dense detector: a convolutional trunk, a box head with exponentiated sizes, a class head.

Batch: (images (n, c, h, w), boxes (n, cells, cells, 4) pixels, labels (n, cells, cells) int64), where a label
equal to the number of classes means background. Boxes are (x0, y0, x1, y1).

Where the box loss is in pixels and sizes are exponentiated without a clamp, its gradient with respect to the
raw size t grows as exp(2 t): one step too long and it explodes, which is why detection libraries clamp t (or take
the loss in logarithms). The class head's gradients stay of order one and are starved by any limit on the whole.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsplit.workloads.boxes import cell_centres, mean_average_precision, overlap, suppress
from gradsplit.workloads.scenes import Scenes
from gradsplit.workloads.task import Batch, Task, evaluating, reject_unknown

VARIANTS = ("two-tower", "shared-trunk")
CONFIDENCE_FLOOR = 0.05  # fainter predictions cannot move a mean average precision by much, but cost time


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, 1), nn.ReLU())


class Detector(nn.Module):
    """One prediction a cell of 8 x 8 pixels: four raw box numbers, and logits of the classes and background.

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
        cell: pixels a cell.
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

        The cross-entropy is the mean over owned cells plus the mean over background cells, so that
        background, of which there is more, does not drown the classes. The box error is the mean square in
        pixels; `healthy` takes the smooth L1 error in units of a cell and the sizes in logarithms, where nothing
        is exponentiated.
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

    def score(self, model: nn.Module, scenes: Scenes) -> dict[str, float]:
        """Scores of `model` on `scenes`.

        Returns:
            "score": mean over all objects of IoU at the object's own cell x (class right there); "iou" and
            "class_accuracy", its two parts; "map" and "map50", mean average precision of everything found.
        """
        with evaluating(model):
            parts = [model(images.to(self.device)) for images in scenes.images.split(64)]
        raw = torch.cat([part[0] for part in parts]).cpu()
        probability = torch.cat([part[1] for part in parts]).cpu().softmax(-1)
        corners = to_corners(decode(raw, self.cell, self.anchor))
        best, classes = probability[..., :-1].max(-1)
        owned = scenes.labels != self.num_classes
        right = (classes[owned] == scenes.labels[owned]) & probability[owned].isfinite().all(-1)
        iou = overlap(corners[owned], scenes.boxes[owned])
        found = []
        for n in range(len(raw)):
            sure = (best[n] > CONFIDENCE_FLOOR) & corners[n].isfinite().all(-1)
            kept = suppress(corners[n][sure], best[n][sure])
            found.append((corners[n][sure][kept], classes[n][sure][kept], best[n][sure][kept]))
        truth = [(scenes.boxes[n][owned[n]], scenes.labels[n][owned[n]]) for n in range(len(raw))]
        average, at_50 = mean_average_precision(truth, found)
        return {
            "score": float((iou * right).mean()),
            "iou": float(iou.mean()),
            "class_accuracy": float(right.float().mean()),
            "map": average,
            "map50": at_50,
        }
