"""Detection on composed scenes: a convolutional trunk, a box head with exponentiated sizes, a class head.

Batch: (images, boxes, labels) as in `scenes.Scenes`. Where the box loss is in pixels and sizes are
exponentiated without a clamp, its gradient with respect to the raw size t is proportional to
exp(2 t): one bad step and it explodes, which is why detection libraries clamp t. The class head, whose
gradients are of order one, is then starved by any limit on the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsplit.workloads.boxes import cell_centres, mean_average_precision, overlap
from gradsplit.workloads.scenes import BACKGROUND, Scenes, digit_scenes
from gradsplit.workloads.task import (
    BATCHES,
    Batch,
    Expected,
    Task,
    Workload,
    evaluating,
    generator,
    reject_unknown,
    seeded,
)

SIZE, CELL = 48, 8
VARIANTS = ("two-tower", "shared-trunk")


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, 1), nn.ReLU())


class Detector(nn.Module):
    """One prediction a cell: a box and class logits (10 digits and background).

    "two-tower": a common stem, then one tower a head. "shared-trunk": the heads part at the last layer.
    The centre is the cell's centre plus CELL * (tx, ty); the size is CELL * exp(tw), CELL * exp(th), no clamp.
    """

    def __init__(self, variant: str, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(_stage(1, width, 2), _stage(width, width, 2), _stage(width, 2 * width, 2))
        tower = 2 if variant == "two-tower" else 0
        shared = 2 - tower
        self.trunk.extend(_stage(2 * width, 2 * width, 1) for _ in range(shared))
        self.box_tower = nn.Sequential(*(_stage(2 * width, 2 * width, 1) for _ in range(tower)))
        self.class_tower = nn.Sequential(*(_stage(2 * width, 2 * width, 1) for _ in range(tower)))
        self.box_head = nn.Conv2d(2 * width, 4, 1)
        self.class_head = nn.Conv2d(2 * width, BACKGROUND + 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw boxes (n, cells, cells, 4) and class logits (n, cells, cells, 11) of images (n, 1, size, size)."""
        h = self.trunk(images)
        raw = self.box_head(self.box_tower(h)).permute(0, 2, 3, 1)
        return raw, self.class_head(self.class_tower(h)).permute(0, 2, 3, 1)


def decode(raw: Tensor, cell: float) -> Tensor:
    """Centres and sizes in pixels (..., 4) = (cx, cy, w, h) of raw boxes (n, cells, cells, 4); sizes exp(t)."""
    centres = cell_centres(raw.shape[1], raw.shape[2], cell, raw.device)
    return torch.cat([centres + cell * raw[..., :2], cell * raw[..., 2:].exp()], dim=-1)


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


class DetectionTask(Task):
    """Boxes and classes of handwritten digits in composed scenes."""

    def __init__(
        self, model: nn.Module, scenes: tuple[Scenes, Scenes], seed: int, *, batch: int, healthy: bool
    ) -> None:
        super().__init__(model, seed)
        self.train_scenes, self.test_scenes = scenes
        self.batch_size, self.healthy = batch, healthy

    def draw(self, step: int) -> Batch:
        """Scenes drawn with replacement from the training pool."""
        scenes = self.train_scenes
        picks = torch.randint(
            len(scenes.images), (self.batch_size,), generator=generator(self.seed, BATCHES, step)
        )
        return scenes.images[picks], scenes.boxes[picks], scenes.labels[picks]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Class cross-entropy over all cells + squared box error over the cells that own an object.

        The box error is in pixels; `healthy` takes it in units of a cell and the sizes in logarithms, where
        nothing is exponentiated.
        """
        images, boxes, labels = batch
        raw, logits = model(images)
        owned = labels != BACKGROUND
        class_loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten())
        target = to_centres(boxes[owned])
        if not self.healthy:
            return class_loss + F.mse_loss(decode(raw, CELL)[owned], target)
        centres = cell_centres(raw.shape[1], raw.shape[2], CELL, raw.device).expand(*raw.shape[:3], 2)[owned]
        encoded = torch.cat([(target[:, :2] - centres) / CELL, (target[:, 2:] / CELL).log()], dim=-1)
        return class_loss + F.smooth_l1_loss(raw[owned], encoded)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """ "score": over all objects, IoU at the object's own cell x (digit class right); "map", "map50"."""
        scenes = self.test_scenes
        with evaluating(model):
            parts = [model(images.to(self.device)) for images in scenes.images.split(64)]
        raw = torch.cat([part[0] for part in parts]).cpu()
        probability = torch.cat([part[1] for part in parts]).cpu().softmax(-1)
        corners = to_corners(decode(raw, CELL))
        owned = scenes.labels != BACKGROUND
        best, classes = probability[..., :BACKGROUND].max(-1)
        hit = (classes[owned] == scenes.labels[owned]) & probability[owned].isfinite().all(-1)
        iou = overlap(corners[owned], scenes.boxes[owned])
        kept = best > 0.05
        every = range(len(raw))
        average, at_50 = mean_average_precision(
            [scenes.boxes[n][owned[n]] for n in every],
            [scenes.labels[n][owned[n]] for n in every],
            [corners[n][kept[n]] for n in every],
            [classes[n][kept[n]] for n in every],
            [best[n][kept[n]] for n in every],
        )
        return {
            "score": float((iou * hit).mean()),
            "iou": float(iou.mean()),
            "class_accuracy": float(hit.float().mean()),
            "map": average,
            "map50": at_50,
        }


def build_detection(
    seed: int = 0,
    *,
    variant: str = "two-tower",
    healthy: bool = False,
    width: int = 16,
    batch: int = 16,
    max_objects: int = 3,
) -> DetectionTask:
    """The detection task; see `DETECTION.options`.

    Raises:
        ValueError: unknown variant.
    """
    reject_unknown("build_detection", "variant", variant, VARIANTS)
    scenes = digit_scenes(SIZE, CELL, max_objects, 1000, 200)
    with seeded(seed):
        model = Detector(variant, width)
    return DetectionTask(model, scenes, seed, batch=batch, healthy=healthy)


DETECTION = Workload(
    name="detection",
    title="boxes and classes of real handwriting in composed scenes, exponentiated sizes",
    metric="score",
    higher_is_better=True,
    steps=500,
    optimizer="sgdm",
    lr=0.03,
    expected=Expected(0.3, 7.0, "to be measured"),
    data_note="Composed scenes: scikit-learn's real handwritten digits, pasted at random places and sizes.",
    build=build_detection,
    options={
        "variant": '"two-tower" (a tower a head) or "shared-trunk" (heads part at the last layer)',
        "healthy": "sizes in logarithms, errors in cells: the same task with a loss that does not explode",
        "width": "channels of the first stage",
        "batch": "scenes a step",
        "max_objects": "most objects a scene",
    },
)
