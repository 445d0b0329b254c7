"""Weights & Biases: the same scalars, in the run that is active or a new one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from ..record import Rows
from .scalars import scalars_of

__all__ = ["WandbSink"]


class WandbSink:
    """Log scalars ``gradsplit/…``; a sink of `Recorder`.

    Only plain finite floats are sent: histograms of non-finite gradients are what crashes elsewhere. The steps are an
    axis of their own (``gradsplit/step``), so that the script's own ``wandb.log`` keeps its count.

    Args:
        place: a project, or a run of yours, which stays open.

    Raises:
        ImportError: the package wandb is missing.
    """

    def __init__(self, place: Any) -> None:
        self._owns = not hasattr(place, "log")
        if self._owns:
            try:
                wandb: Any = importlib.import_module("wandb")
            except ImportError as error:
                raise ImportError(
                    f"WandbSink({place!r}): expected the package wandb. Run: pip install wandb"
                ) from error
            place, self._owns = (wandb.run, False) if wandb.run is not None else (wandb.init(project=str(place)), True)
        self._run = place
        self._run.define_metric("gradsplit/step")
        self._run.define_metric("gradsplit/*", step_metric="gradsplit/step")

    def write(self, batch: Sequence[Rows]) -> None:
        """Take the rows of one flush."""
        for rows in batch:
            for step, _, values in scalars_of(rows):
                self._run.log({"gradsplit/step": step, **{f"gradsplit/{name}": v for name, v in values.items()}})

    def close(self, **meta: Any) -> None:
        """Finish the run, if it is ours."""
        if self._owns:
            self._run.finish()
