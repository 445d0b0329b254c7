"""MLflow: the same scalars as metrics, in the run that is active or a new one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from ..record import Rows
from .scalars import scalars_of

__all__ = ["MlflowSink"]

_NOT_ALLOWED = re.compile(r"[^\w./ -]")  # in names of metrics


class MlflowSink:
    """Log metrics ``gradsplit/…``; a sink of `Recorder`.

    Args:
        place: an experiment's name, or a client with ``log_metrics(metrics, step=…)`` such as the module mlflow
            inside a run of yours.

    Raises:
        ImportError: the package mlflow is missing.
    """

    def __init__(self, place: Any) -> None:
        self._owns = False
        if not hasattr(place, "log_metrics"):
            try:
                mlflow: Any = importlib.import_module("mlflow")
            except ImportError as error:
                raise ImportError(
                    f"MlflowSink({place!r}): expected the package mlflow. Run: pip install mlflow"
                ) from error
            if mlflow.active_run() is None:
                mlflow.set_experiment(str(place))
                mlflow.start_run()
                self._owns = True
            place = mlflow
        self._client = place

    def write(self, batch: Sequence[Rows]) -> None:
        """Take the rows of one flush."""
        for rows in batch:
            for step, _, values in scalars_of(rows):
                metrics = {f"gradsplit/{_NOT_ALLOWED.sub('_', name)}": value for name, value in values.items()}
                self._client.log_metrics(metrics, step=step)

    def close(self, **meta: Any) -> None:
        """End the run, if it is ours."""
        if self._owns:
            self._client.end_run()
