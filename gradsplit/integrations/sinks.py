"""The sinks by name, one row each, and how a word of the command line becomes one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..record import RowSink

__all__ = ["SINKS", "sink_from_words"]

SINKS: dict[str, tuple[str, str, str]] = {
    "tensorboard": ("tensorboard", "TensorBoardSink", "scalars for TensorBoard, in a folder"),
    "jsonl": ("jsonl", "JsonLinesSink", "one JSON object a step, in a file"),
    "wandb": ("wandb", "WandbSink", "a run of Weights & Biases, in a project"),
    "mlflow": ("mlflow", "MlflowSink", "metrics of an MLflow run, in an experiment"),
}
"""Name -> (module of this package, class, what it makes)."""


def sink_from_words(word: str) -> RowSink:
    """Return the sink of ``NAME:PLACE``.

    Raises:
        ValueError: an unknown name, or no place.

    >>> sink_from_words("jsonl")
    Traceback (most recent call last):
    ...
    ValueError: --to jsonl: expected NAME:PLACE with NAME of tensorboard, jsonl, wandb, mlflow. Write --to jsonl:PLACE.
    """
    name, _, place = word.partition(":")
    if name not in SINKS or not place:
        hint = name if name in SINKS else next(iter(SINKS))
        raise ValueError(f"--to {word}: expected NAME:PLACE with NAME of {', '.join(SINKS)}. Write --to {hint}:PLACE.")
    module, cls, _ = SINKS[name]
    made: Any = getattr(importlib.import_module(f".{module}", __package__), cls)
    sink: RowSink = made(place)
    return sink
