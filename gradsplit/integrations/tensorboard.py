"""TensorBoard: norms, losses and outcomes as scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..record import Rows
from .scalars import scalars_of

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Write scalars ``gradsplit/…`` with ``torch.utils.tensorboard``; a sink of `Recorder`.

    Args:
        place: a folder for event files, or a ``SummaryWriter`` of yours, which stays open.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    def __init__(self, place: Any) -> None:
        self._owns = not hasattr(place, "add_scalar")
        if self._owns:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"TensorBoardSink({place!r}): expected the package tensorboard. Run: pip install tensorboard"
                ) from error
            place = SummaryWriter(str(place))
        self._writer = place

    def write(self, batch: Sequence[Rows]) -> None:
        """Take the rows of one flush."""
        for rows in batch:
            for step, when, values in scalars_of(rows):
                for name, value in values.items():
                    self._writer.add_scalar(f"gradsplit/{name}", value, step, walltime=when)
        self._writer.flush()

    def close(self, **meta: Any) -> None:
        """Close the event file, if it is ours."""
        if self._owns:
            self._writer.close()
