"""Tree crowns in real aerial photographs: 951 hand-drawn boxes that the package deepforest carries.

Batch: as in `detector`, images (batch, 3, 64, 64) float32 in [-0.5, 0.5]: tiles of 128 x 128 pixels of the
photographs, halved. Training tiles are cut at random from one photograph of the site YELL, and validation tiles from
another of that site. Test tiles come from the site OSBS, another landscape, and are reported apart.
"""

from __future__ import annotations

import base64
import importlib.util
import io
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import BATCHES, WITH_THE_PRESENT_DEFAULT, Batch, MissingDataError, Workload, generator, measured, seeded
from .detector import Detector, DetectorTask, overlap
from .scenes import Scenes


def package_folder(name: str, call: str, install: str) -> Path:
    """The folder of package `name`; the package is not imported, since that would pull in its dependencies.

    Args:
        name: an importable top-level package.
        call: the caller, for the error.
        install: the command that installs it.

    Raises:
        MissingDataError: it is not installed; the text names `install`.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(
            f"{call}: expected the package {name}, whose data files are read, found none. Run: {install}"
        )
    return Path(spec.submodule_search_locations[0])


TRAIN = "2019_YELL_2_528000_4978000_image_crop2"
VALIDATION = "2019_YELL_2_541000_4977000_image_crop"
TEST = "OSBS_029"
UNUSED = "SOAP_061"  # its classes are Dead and Alive, those of the others Tree
INSTALL = "pip install --no-deps deepforest==2.1.0"
HALVED, TILE, CELL, ANCHOR = 2, 64, 8, 16.0
LIGHT = 0.3  # brightness varies by this share: the sites were flown at other hours
TREE, BACKGROUND = 0, 1
EXAMPLE_TILES = (4, 2)  # across and down of the piece that pictures show


def read_boxes(stem: str) -> Tensor:
    """The hand-drawn boxes of one photograph, (n, 4) float32 in its own pixels.

    Args:
        stem: the photograph's file name without its ending.

    Raises:
        MissingDataError: the data is not installed.
    """
    path = package_folder("deepforest", f"read_boxes({stem!r})", INSTALL) / "data" / f"{stem}.xml"
    objects = ElementTree.parse(path).getroot().iter("bndbox")
    sides = ("xmin", "ymin", "xmax", "ymax")
    return torch.tensor([[float(box.findtext(side) or "nan") for side in sides] for box in objects])


def read_image(stem: str) -> Tensor:
    """One photograph (3, h, w) float32 in [-0.5, 0.5].

    Args:
        stem: the photograph's file name without its ending.

    Raises:
        MissingDataError: the data, or pillow to read it, is not installed.
    """
    path = package_folder("deepforest", f"read_image({stem!r})", INSTALL) / "data" / f"{stem}.png"
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDataError(
            f"read_image({stem!r}): expected the package pillow, found none. Run: pip install pillow"
        ) from error
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255.0 - 0.5).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=3)
def photograph(stem: str) -> tuple[Tensor, Tensor]:
    """Image (3, h / 2, w / 2), averaged over 2 x 2 pixels, and its boxes in those pixels."""
    return F.avg_pool2d(read_image(stem)[None], HALVED)[0], read_boxes(stem) / HALVED


def cut(image: Tensor, boxes: Tensor, left: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """One tile with the boxes whose centres it holds, each cut to the tile and given to its centre's cell.

    Where two centres share a cell the box with the larger area stays.

    Args:
        image: (3, h, w).
        boxes: (n, 4) pixels of `image`.
        left: first column of the tile.
        top: first row of the tile.

    Returns:
        Tile (3, 64, 64), boxes (8, 8, 4) in the tile's pixels, labels (8, 8).
    """
    local = boxes - torch.tensor([left, top, left, top])
    centre = (local[:, :2] + local[:, 2:]) / 2
    local = local[((centre >= 0) & (centre < TILE)).all(-1)]
    local = local[((local[:, 2:] - local[:, :2]).prod(-1)).argsort()]  # the larger is written last
    cells = (((local[:, :2] + local[:, 2:]) / 2) // CELL).long()
    grid = torch.zeros(TILE // CELL, TILE // CELL, 4)
    labels = torch.full((TILE // CELL, TILE // CELL), BACKGROUND)
    for (column, row), box in zip(cells.tolist(), local.clamp(0, TILE), strict=True):
        grid[row, column] = box
        labels[row, column] = TREE
    return image[:, top : top + TILE, left : left + TILE], grid, labels


def turned(image: Tensor, boxes: Tensor, mirror_x: bool, mirror_y: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    """One of the eight symmetries of the square, on a tile and its boxes alike: a forest has no up.

    Args:
        image: (3, 64, 64).
        boxes: (n, 4) in its pixels.
        mirror_x: exchange left and right.
        mirror_y: exchange top and bottom.
        transpose: then exchange x and y.

    >>> image, boxes = turned(torch.zeros(3, 64, 64), torch.tensor([[0., 1., 2., 9.]]), True, False, True)
    >>> boxes.tolist()
    [[1.0, 62.0, 9.0, 64.0]]
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    if mirror_x:
        image, x0, x1 = image.flip(2), TILE - x1, TILE - x0
    if mirror_y:
        image, y0, y1 = image.flip(1), TILE - y1, TILE - y0
    if transpose:
        image, x0, y0, x1, y1 = image.transpose(1, 2), y0, x0, y1, x1
    return image, torch.stack([x0, y0, x1, y1], dim=1)


@lru_cache(maxsize=2)
def tiles(stem: str) -> Scenes:
    """A photograph as tiles side by side, centred; a margin narrower than a tile is left out."""
    image, boxes = photograph(stem)
    down, across = image.shape[1] // TILE, image.shape[2] // TILE
    top, left = (image.shape[1] - down * TILE) // 2, (image.shape[2] - across * TILE) // 2
    parts = [
        cut(image, boxes, left + TILE * column, top + TILE * row) for row in range(down) for column in range(across)
    ]
    images, grids, labels = (torch.stack(list(part)) for part in zip(*parts, strict=True))
    return Scenes(images, grids, labels, CELL)


def _jpeg(image: Tensor) -> str:
    """An image (3, h, w) in [-0.5, 0.5] as the base64 text of a JPEG file."""
    from PIL import Image

    pixels = ((image.permute(1, 2, 0) + 0.5) * 255).round().clamp(0, 255).byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=70)
    return base64.b64encode(file.getvalue()).decode()


class AerialTask(DetectorTask):
    """Find the trees of an aerial photograph."""

    def __init__(self, model: nn.Module, seed: int, *, batch: int, healthy: bool) -> None:
        super().__init__(model, seed, cell=CELL, anchor=ANCHOR, num_classes=1, healthy=healthy)
        self.image, self.boxes = photograph(TRAIN)
        self.validation, self.other_site = tiles(VALIDATION), tiles(TEST)
        self.batch_size = batch

    def draw(self, step: int) -> Batch:
        """Tiles around random trees of the training photograph, mirrored, transposed and lit at random."""
        draw = generator(self.seed, BATCHES, step)
        trees = torch.randint(len(self.boxes), (self.batch_size,), generator=draw)
        shifts = torch.rand(self.batch_size, 2, generator=draw)
        turns = torch.randint(2, (self.batch_size, 3), generator=draw).bool().tolist()
        light = 1.0 + LIGHT * (2.0 * torch.rand(self.batch_size, 1, 1, 1, generator=draw) - 1.0)
        height, width = self.image.shape[1:]
        centres = (self.boxes[trees, :2] + self.boxes[trees, 2:]) / 2
        corners = (centres - TILE * shifts).long().clamp(min=0)
        corners = torch.minimum(corners, torch.tensor([width - TILE, height - TILE]))
        parts = []
        for (left, top), turn in zip(corners.tolist(), turns, strict=True):
            image = self.image[:, top : top + TILE, left : left + TILE]
            parts.append(cut(*turned(image, self.boxes - torch.tensor([left, top, left, top]), *turn), 0, 0))
        images, grids, labels = (torch.stack(list(part)) for part in zip(*parts, strict=True))
        # Brightness is a factor of the light, so it acts on the values counted from black.
        return (images + 0.5) * light - 0.5, grids, labels

    def example(self, model: nn.Module) -> dict[str, Any]:
        """One piece of the validation photograph, with the boxes drawn by hand and those found.

        Returns:
            "jpeg": the piece as base64 text; "size": its width and height; "truth": boxes [x0, y0, x1, y1]; "found":
            as many boxes as were drawn, the surest, with their confidence as a fifth number; "hit": how many of those
            drawn a found one overlaps by more than half. Lengths in pixels of the piece.
        """
        across, down = EXAMPLE_TILES
        image, boxes = photograph(VALIDATION)
        places = [(TILE * column, TILE * row) for row in range(down) for column in range(across)]
        corner = [(image.shape[2] - TILE * across) // 2, (image.shape[1] - TILE * down) // 2]
        images = torch.stack([image[:, corner[1] + top :, corner[0] + left :][:, :TILE, :TILE] for left, top in places])
        finds = []
        for (left, top), (corners, _, scores) in zip(places, self.finds(model, images)[2], strict=True):
            finds.append(torch.cat([HALVED * (corners + torch.tensor([left, top, left, top])), scores[:, None]], 1))
        local = boxes - torch.tensor(corner * 2)
        centre = (local[:, :2] + local[:, 2:]) / 2
        size = (TILE * across, TILE * down)
        inside = ((centre >= 0) & (centre < torch.tensor(size))).all(-1)
        left, top = (HALVED * at for at in corner)
        piece = read_image(VALIDATION)[:, top : top + HALVED * size[1], left : left + HALVED * size[0]]
        truth, found = HALVED * local[inside], torch.cat(finds)
        found = found[found[:, 4].argsort(descending=True, stable=True)][: len(truth)]
        overlaps = overlap(truth[:, None], found[None, :, :4])
        return {
            "jpeg": _jpeg(piece),
            "size": [HALVED * side for side in size],
            "truth": truth.tolist(),
            "found": found.tolist(),
            "hit": int((overlaps > 0.5).any(1).sum()) if len(found) else 0,
        }

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Give "map50", "map" and "iou" of the validation photograph, and as "test_..." of the other site.

        "iou" is the mean at the trees' own cells; with one class there is no class to get right.
        """
        here, there = self.score(model, self.validation), self.score(model, self.other_site)
        names = ("map50", "map", "iou")
        return {name: here[name] for name in names} | {f"test_{name}": there[name] for name in names}


def build_aerial(
    seed: int = 0, *, variant: str = "two-tower", healthy: bool = False, width: int = 16, batch: int = 16
) -> AerialTask:
    """The aerial task; see `AERIAL.options`."""
    with seeded(seed):
        model = Detector(variant, 3, width, 1)
    return AerialTask(model, seed, batch=batch, healthy=healthy)


AERIAL = Workload(
    name="aerial",
    title="tree crowns in real aerial photographs, exponentiated sizes",
    metric="map50",
    higher_is_better=True,
    steps=500,
    optimizer="sgdm",
    lr=0.1,
    expected=measured(
        0.208, 16, "gradsplit compare aerial --methods default --lr 0.1 --seeds 1", WITH_THE_PRESENT_DEFAULT
    ),
    data_note=(
        "951 hand-drawn tree crowns in four aerial photographs (NEON; Weinstein et al.), data files of "
        f"deepforest 2.1.0 ({INSTALL}): training 574, validation 279, test on another site 61, unused 37."
    ),
    build=build_aerial,
    options={
        "variant": '"two-tower" (a tower a head) or "shared-trunk" (heads part at the last layer)',
        "healthy": "sizes in logarithms, errors in cells: the same task with a loss that does not explode",
        "width": "channels of the first stage",
        "batch": "tiles a step",
    },
)
