"""Composed scenes: real handwriting at random places and sizes. The digits are real, the layout is synthetic.

Boxes are (x0, y0, x1, y1) in pixels. A cell of a grid owns an object when it holds the object's centre;
no cell owns two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..task import DATA, generator
from .digits import load_digits

BACKGROUND = 10


@dataclass(frozen=True)
class Scenes:
    """Images with their objects, laid out on a grid of cells.

    Attributes:
        images: (n, 1, size, size) float32 in [0, 1].
        boxes: (n, cells, cells, 4) float32 pixels; zeros where the cell owns nothing.
        labels: (n, cells, cells) int64, 0 to 9, or BACKGROUND.
        cell: pixels per cell.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    cell: int


def _place(box: tuple[int, int, int, int], taken: list[tuple[int, int, int, int]]) -> bool:
    return all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken)


def compose(images: Tensor, labels: Tensor, *, count: int, size: int, cell: int, max_objects: int, seed: int) -> Scenes:
    """Draw `count` scenes of 1 to `max_objects` digits that do not overlap.

    Each digit is cut to its ink, resized (bilinear) to 8 to 16 pixels a side, each side on its own, and laid
    on black. A place that overlaps another object, or whose cell is taken, is drawn again up to 20 times.

    Args:
        images: (m, 8, 8) digits.
        labels: (m,) their classes.
        count: scenes.
        size: pixels a side of a scene; a multiple of `cell`.
        cell: pixels per cell.
        max_objects: most objects a scene.
        seed: fixes everything.
    """
    draw = generator(seed, DATA, 1)
    cells = size // cell
    scenes = torch.zeros(count, 1, size, size)
    boxes = torch.zeros(count, cells, cells, 4)
    owners = torch.full((count, cells, cells), BACKGROUND)
    # All numbers at once: 20 tries for each of the objects of each scene, in units of the unit interval.
    numbers = torch.rand(count, max_objects, 20, 4, generator=draw).tolist()
    picks = torch.randint(len(images), (count, max_objects), generator=draw).tolist()
    wanted = torch.randint(1, max_objects + 1, (count,), generator=draw).tolist()
    for n in range(count):
        taken: list[tuple[int, int, int, int]] = []
        for k in range(wanted[n]):
            for u, v, a, b in numbers[n][k]:
                width, height = 8 + int(9 * u), 8 + int(9 * v)
                x0, y0 = int(a * (size - width + 1)), int(b * (size - height + 1))
                box = (x0, y0, x0 + width, y0 + height)
                row, column = (y0 + height // 2) // cell, (x0 + width // 2) // cell
                if owners[n, row, column] == BACKGROUND and _place(box, taken):
                    digit = images[picks[n][k]]
                    ink_y, ink_x = torch.where(digit > 0.1)
                    digit = digit[int(ink_y.min()) : int(ink_y.max()) + 1, int(ink_x.min()) : int(ink_x.max()) + 1]
                    scenes[n, 0, y0 : y0 + height, x0 : x0 + width] = F.interpolate(
                        digit[None, None], (height, width), mode="bilinear", align_corners=False
                    )[0, 0]
                    boxes[n, row, column] = torch.tensor(box, dtype=torch.float32)
                    owners[n, row, column] = labels[picks[n][k]]
                    taken.append(box)
                    break
    return Scenes(scenes, boxes, owners, cell)


@lru_cache(maxsize=4)
def digit_scenes(size: int, cell: int, max_objects: int, count: int, test_count: int) -> tuple[Scenes, Scenes]:
    """Training and test scenes; their digits come from the training and the test split of the digits.

    The scenes do not depend on a task's seed: seeds differ in weights and batches, and share the test set.
    """
    x, y, test_x, test_y = load_digits()
    train = compose(x, y, count=count, size=size, cell=cell, max_objects=max_objects, seed=0)
    test = compose(test_x, test_y, count=test_count, size=size, cell=cell, max_objects=max_objects, seed=1)
    return train, test
