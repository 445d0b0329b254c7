"""Where rows of a run can go beside the run file: TensorBoard, JSON lines, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TextIO

import numpy as np

from .record import Rows, RowSink, Stream, Turns

__all__ = [
    "scalars_of",
    "turns_of",
    "top_nodes",
    "JsonLinesSink",
    "TensorBoardSink",
    "WandbSink",
    "MlflowSink",
    "SINKS",
    "check_words",
    "sink_from_words",
]

_MAX_MODULES = 30


def top_nodes(stream: Stream, depth: int = 1) -> list[int]:
    """Return the nodes worth a curve each: modules and tensors down to a depth below the first fork.

    Args:
        stream: whose nodes.
        depth: 1: the children of the root (of the level below where the root has only one child); 2: their children
            too, and so on; 0: every module and tensor.
    """
    outline, nodes = stream.outline, stream.outline.children(0)
    while len(nodes) == 1 and outline.children(nodes[0]):
        nodes = outline.children(nodes[0])
    if depth == 1:
        return nodes[:_MAX_MODULES]
    found: list[int] = []
    level = 1
    while nodes:
        found += nodes
        level += 1
        if depth and level > depth:
            break
        nodes = [below for node in nodes for below in outline.children(node) if outline.levels_N[below] != "leaf"]
    return sorted(found)


def scalars_of(rows: Rows, depth: int = 1) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Yield (step, time, {name: value}); non-finite norms are counted under ``nonfinite`` and otherwise left out.

    Names: ``norm/all``, ``norm/<module>``, ``loss``, ``lr``, ``own_scale``, ``nonfinite``; under control ``kept/all``
    (norm after / before), ``scaled``, ``zeroed`` (bins). A second optimizer's begin with ``1/``, and so on. ``depth``:
    see `top_nodes`.
    """
    outline, stream = rows.stream.outline, rows.stream
    nodes = top_nodes(stream, depth)
    norms, total = rows.node_norms(nodes), rows.total_S
    prefix = f"{stream.index}/" if stream.index else ""
    after = None
    if rows.kept_SL is not None:
        after = (((rows.norm_SL.astype("f8") * rows.kept_SL) ** 2).sum(axis=1)) ** 0.5
    for s in range(len(rows)):
        values = {"norm/all": float(total[s]), "loss": float(rows.loss_S[s]), "lr": float(rows.lr_S[s])}
        values |= {f"norm/{outline.names_N[node]}": float(norms[s, i]) for i, node in enumerate(nodes)}
        values["own_scale"] = float(rows.own_scale_S[s])
        if after is not None and rows.scaled_SL is not None and rows.zeroed_SL is not None:
            values["kept/all"] = float(after[s] / total[s]) if total[s] else 1.0
            values["scaled"] = float(rows.scaled_SL[s].sum())
            values["zeroed"] = float(rows.zeroed_SL[s].sum())
        finite = {prefix + name: value for name, value in values.items() if math.isfinite(value)}
        finite[f"{prefix}nonfinite"] = float(sum(not math.isfinite(value) for value in rows.norm_SL[s].tolist()))
        yield int(rows.step_S[s]), float(rows.time_S[s]), finite


def turns_of(turns: Turns, depth: int = 1) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, {name: value}) of the steps of GSO that were read; what was not measured is left out.

    Names: ``turned/all`` and ``turned/<module>`` (degrees between gradients and steps, means over tensors),
    ``at_limit/all`` and ``bounded/all`` (shares of rows, means over tensors), ``batch_factor`` (below 1 where the batch
    was scaled as a whole). ``depth``: see `top_nodes`.
    """
    stream, names = turns.stream, list(turns.stream.about.get("names") or ())
    prefix, inside = f"{stream.index}/" if stream.index else "", {"all": list(range(len(names)))}
    for node in top_nodes(stream, depth):
        top = stream.outline.names_N[node]
        inside[top] = [t for t, name in enumerate(names) if name == top or name.startswith(f"{top}.")]
    for k in range(len(turns)):
        values = {f"turned/{name}": _mean(turns.turned_KT[k, at]) for name, at in inside.items()}
        values |= {"at_limit/all": _mean(turns.limit_KT[k]), "bounded/all": _mean(turns.bounded_KT[k])}
        values["batch_factor"] = float(turns.factor_K[k])
        yield int(turns.step_K[k]), {prefix + name: value for name, value in values.items() if math.isfinite(value)}


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


class _Sink(ABC):
    """A sink of `Recorder` that sends named numbers; where they go is said by `_send`."""

    package: ClassVar[str] = ""  # that must be installed

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def write(self, batch: Sequence[Rows]) -> None:
        """Take the rows of one flush."""
        for rows in batch:
            for step, when, values in scalars_of(rows, self._depth):
                self._send(rows.stream.index, step, values, when)
        self._flush()

    def add_turns(self, turns: Turns) -> None:
        """Take what GSO's steps did."""
        for step, values in turns_of(turns, self._depth):
            self._send(turns.stream.index, step, values, None)
        self._flush()

    @abstractmethod
    def close(self, **meta: Any) -> None:
        """Close what is ours."""

    @abstractmethod
    def _send(self, optimizer: int, step: int, values: dict[str, float], when: float | None) -> None:
        """Send the values of one step of an optimizer, seconds since the epoch beside them where they are known."""

    def _flush(self) -> None:  # noqa: B027 - most packages see to it themselves
        """Have what was sent arrive."""


def _package(name: str, call: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{call}: expected the package {install}. Run: pip install {install}") from error


class JsonLinesSink(_Sink):
    """Append ``{"step": 12, "time": …, "loss": …, "norm/all": …}`` per step to a file; a sink of `Recorder`.

    Args:
        place: the file; opened to append, so that nothing is lost.
        depth: levels of modules, see `top_nodes`.
    """

    def __init__(self, place: str | os.PathLike[str], *, depth: int = 1) -> None:
        super().__init__(depth)
        self._file: TextIO = open(place, "a", encoding="utf8")  # noqa: SIM115 - closed by close()

    def _send(self, optimizer: int, step: int, values: dict[str, float], when: float | None) -> None:
        time = {} if when is None else {"time": round(when, 3)}
        self._file.write(json.dumps({"step": step, **time, "optimizer": optimizer, **values}) + "\n")

    def _flush(self) -> None:
        self._file.flush()

    def close(self, **meta: Any) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink(_Sink):
    """Write scalars ``gradsplit/…`` with ``torch.utils.tensorboard``; a sink of `Recorder`.

    Args:
        place: a folder for event files, or a ``SummaryWriter`` of yours, which stays open.
        depth: levels of modules, see `top_nodes`.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    package: ClassVar[str] = "tensorboard"

    def __init__(self, place: Any, *, depth: int = 1) -> None:
        super().__init__(depth)
        self._owns = not hasattr(place, "add_scalar")
        if self._owns:
            module = _package("torch.utils.tensorboard", f"TensorBoardSink({place!r})", "tensorboard")
            place = module.SummaryWriter(str(place))
        self._writer = place

    def _send(self, optimizer: int, step: int, values: dict[str, float], when: float | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"gradsplit/{name}", value, step, walltime=when)

    def _flush(self) -> None:
        self._writer.flush()

    def close(self, **meta: Any) -> None:
        """Close the event file, if it is ours."""
        if self._owns:
            self._writer.close()


class WandbSink(_Sink):
    """Log scalars ``gradsplit/…``; a sink of `Recorder`.

    Only plain finite floats are sent: histograms of non-finite gradients are what crashes elsewhere. The steps are an
    axis of their own (``gradsplit/step``), so that the script's own ``wandb.log`` keeps its count.

    Args:
        place: a project, or a run of yours, which stays open.
        depth: levels of modules, see `top_nodes`.

    Raises:
        ImportError: the package wandb is missing.
    """

    package: ClassVar[str] = "wandb"

    def __init__(self, place: Any, *, depth: int = 1) -> None:
        super().__init__(depth)
        self._owns = not hasattr(place, "log")
        if self._owns:
            wandb = _package("wandb", f"WandbSink({place!r})", "wandb")
            place, self._owns = (wandb.run, False) if wandb.run is not None else (wandb.init(project=str(place)), True)
        self._run = place
        self._run.define_metric("gradsplit/step")
        self._run.define_metric("gradsplit/*", step_metric="gradsplit/step")

    def _send(self, optimizer: int, step: int, values: dict[str, float], when: float | None) -> None:
        self._run.log({"gradsplit/step": step, **{f"gradsplit/{name}": v for name, v in values.items()}})

    def close(self, **meta: Any) -> None:
        """Finish the run, if it is ours."""
        if self._owns:
            self._run.finish()


_NOT_ALLOWED = re.compile(r"[^\w./ -]")  # in names of metrics


class MlflowSink(_Sink):
    """Log metrics ``gradsplit/…``; a sink of `Recorder`.

    Args:
        place: an experiment's name, or a client with ``log_metrics(metrics, step=…)`` such as the module mlflow
            inside a run of yours.
        depth: levels of modules, see `top_nodes`.

    Raises:
        ImportError: the package mlflow is missing.
    """

    package: ClassVar[str] = "mlflow"

    def __init__(self, place: Any, *, depth: int = 1) -> None:
        super().__init__(depth)
        self._owns = False
        if not hasattr(place, "log_metrics"):
            mlflow = _package("mlflow", f"MlflowSink({place!r})", "mlflow")
            if mlflow.active_run() is None:
                mlflow.set_experiment(str(place))
                mlflow.start_run()
                self._owns = True
            place = mlflow
        self._client = place

    def _send(self, optimizer: int, step: int, values: dict[str, float], when: float | None) -> None:
        metrics = {f"gradsplit/{_NOT_ALLOWED.sub('_', name)}": value for name, value in values.items()}
        self._client.log_metrics(metrics, step=step)

    def close(self, **meta: Any) -> None:
        """End the run, if it is ours."""
        if self._owns:
            self._client.end_run()


SINKS: dict[str, tuple[Any, str]] = {
    "tensorboard": (TensorBoardSink, "scalars for TensorBoard, in a folder"),
    "jsonl": (JsonLinesSink, "one JSON object per step, in a file"),
    "wandb": (WandbSink, "a run of Weights & Biases, in a project"),
    "mlflow": (MlflowSink, "metrics of an MLflow run, in an experiment"),
}
"""Name -> (class, what it makes); the class names the package that it needs."""


def sink_from_words(word: str, *, depth: int = 1) -> RowSink:
    """Return the sink of ``NAME:PLACE``; ``depth`` as in `top_nodes`.

    Raises:
        ValueError: an unknown name, or no place.

    >>> sink_from_words("jsonl")
    Traceback (most recent call last):
    ...
    ValueError: --to jsonl: expected NAME:PLACE with NAME of tensorboard, jsonl, wandb, mlflow. Write --to jsonl:PLACE.
    """
    check_words(word)
    name, _, place = word.partition(":")
    return SINKS[name][0](place, depth=depth)


def check_words(word: str) -> None:
    """Refuse what `sink_from_words` cannot make, before anything runs.

    Raises:
        ValueError: an unknown name, no place, or a package that is not installed.
    """
    name, _, place = word.partition(":")
    if name not in SINKS or not place:
        hint = name if name in SINKS else next(iter(SINKS))
        raise ValueError(f"--to {word}: expected NAME:PLACE with NAME of {', '.join(SINKS)}. Write --to {hint}:PLACE.")
    package = SINKS[name][0].package
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"--to {word}: expected the package {package}, which is missing. Run: pip install {package}")
