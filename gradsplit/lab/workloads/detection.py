"""Detection of real handwriting in composed scenes, with a box loss that explodes as such losses do.

How the failure was chosen. Nothing is rigged: the box error is the mean square in pixels, as such a loss is first
written. Scenes are 32 pixels wide, so a raw size of zero is off by up to 8 pixels. The box error is several times the
class error in the first loss.

These are the scores without control, under SGD with momentum 0.9, after 500 steps (seed 0). They are 0.09 at a learning
rate of 0.003 and 0.08 at 0.01: boxes are found, but classes stay at chance. From 0.03 on they are 0: the sizes
overflow. The loss in logarithms (`healthy=True`), with the same net and data, trains at 0.03.
"""

from __future__ import annotations

import torch
from torch import nn

from ..task import BATCHES, WITH_THE_PRESENT_DEFAULT, Batch, Workload, generator, measured, seeded
from .detector import Detector, DetectorTask
from .scenes import BACKGROUND, Scenes, digit_scenes

SIZE, CELL = 32, 8
NUM_TRAIN, NUM_TEST = 2000, 300


class DetectionTask(DetectorTask):
    """Boxes and classes of handwritten digits in composed scenes."""

    def __init__(
        self, model: nn.Module, scenes: tuple[Scenes, Scenes], seed: int, *, batch: int, healthy: bool
    ) -> None:
        super().__init__(model, seed, cell=CELL, anchor=float(CELL), num_classes=BACKGROUND, healthy=healthy)
        self.train_scenes, self.test_scenes = scenes
        self.batch_size = batch

    def draw(self, step: int) -> Batch:
        """Scenes drawn with replacement from the training pool."""
        scenes = self.train_scenes
        picks = torch.randint(len(scenes.images), (self.batch_size,), generator=generator(self.seed, BATCHES, step))
        return scenes.images[picks], scenes.boxes[picks], scenes.labels[picks]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`DetectorTask.score` on the 300 test scenes, whose digits no training scene shows."""
        return self.score(model, self.test_scenes)


def build_detection(
    seed: int = 0,
    *,
    variant: str = "two-tower",
    healthy: bool = False,
    width: int = 16,
    batch: int = 32,
    max_objects: int = 3,
) -> DetectionTask:
    """The detection task; see `DETECTION.options`."""
    with seeded(seed):
        model = Detector(variant, 1, width, BACKGROUND)
    scenes = digit_scenes(SIZE, CELL, max_objects, NUM_TRAIN, NUM_TEST)
    return DetectionTask(model, scenes, seed, batch=batch, healthy=healthy)


DETECTION = Workload(
    name="detection",
    title="boxes and classes of real handwriting in composed scenes, exponentiated sizes",
    metric="score",
    higher_is_better=True,
    steps=500,
    optimizer="sgdm",
    lr=0.1,
    expected=measured(
        0.287, 15, "gradsplit compare detection --methods default --lr 0.1 --seeds 1", WITH_THE_PRESENT_DEFAULT
    ),
    data_note=(
        "Composed scenes: scikit-learn's real handwritten digits, cut to their ink and pasted at random places "
        "and sizes (the layout is synthetic); 2,000 for training, 300 for testing with digits of their own."
    ),
    build=build_detection,
    options={
        "variant": '"two-tower" (a tower a head) or "shared-trunk" (heads part at the last layer)',
        "healthy": "sizes in logarithms, errors in cells: the same task with a loss that does not explode",
        "width": "channels of the first stage",
        "batch": "scenes a step",
        "max_objects": "most objects a scene",
    },
)
