"""A functional state kept in an optimizer's own variables, so that Keras saves, loads and compiles it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch
from keras import backend, ops, tree

from ...budget import Decision
from ...plan import Plan
from ...splitter import StepRecord
from ...xp import namespace

__all__ = ["Kept", "accumulator_dtype", "Rates", "follows_gradient", "Report"]


def accumulator_dtype() -> str:
    """Return the dtype in which this backend adds squares and keeps histories."""
    zero = ops.zeros((1,))
    return str(backend.standardize_dtype(namespace(zero).accumulator([zero]).dtype))


class Kept:
    """A tree of arrays as variables of an optimizer.

    Args:
        optimizer: owns the variables.
        name: what their names begin with.
        first: the state before the first step, numpy; float64 there stands for the backend's own accumulator.
    """

    def __init__(self, optimizer: Any, name: str, first: Any) -> None:
        self._first, wide = first, accumulator_dtype()
        self.variables = [
            optimizer.add_variable(
                array.shape,
                initializer=_filled_with(array),
                dtype=wide if array.dtype == np.float64 else backend.standardize_dtype(array.dtype),
                name=f"{name}_{i}",
            )
            for i, array in enumerate(map(np.asarray, tree.flatten(first)))
        ]

    def read(self) -> Any:
        """Return the state now, as tensors."""
        return tree.pack_sequence_as(self._first, [ops.convert_to_tensor(variable) for variable in self.variables])

    def write(self, state: Any) -> None:
        """Keep the next state."""
        for variable, value in zip(self.variables, tree.flatten(state), strict=True):
            variable.assign(value)


def _filled_with(array: np.ndarray) -> Any:
    return lambda shape, dtype=None: ops.convert_to_tensor(array, dtype=dtype)


_LEAST = 1e-30  # stands for a rate of 0, so that ratios of rates stay defined


def follows_gradient(optimizer_class: type) -> bool:
    """Whether the update is the rate times a momentum sum of gradients: then bounding gradients bounds steps."""
    return issubclass(optimizer_class, keras.optimizers.SGD)


class Rates:
    """Reads an optimizer's learning rate, a number, a variable or a schedule, inside the compiled step."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._top = Kept(optimizer, "largest_rate", np.zeros(()))

    def now(self) -> tuple[Any, Any]:
        """Return the rate and its pace in (0, 1], 0-d; a larger rate than any before is kept."""
        top = self._top.read()
        rate = ops.maximum(ops.cast(self._optimizer.learning_rate, top.dtype), ops.cast(_LEAST, top.dtype))
        top = ops.maximum(top, rate)
        self._top.write(top)
        return rate, rate / top

    def gain(self, rate: Any) -> Any:
        """Return the longest update per length of gradient of SGD, rate / (1 - momentum), 0-d."""
        return rate / (1.0 - getattr(self._optimizer, "momentum", 0.0))


class Report:
    """The last decision of an optimizer, and counts of outcomes since it was built.

    Args:
        optimizer: owns the variables.
        plan: B bins.
    """

    def __init__(self, optimizer: Any, plan: Plan) -> None:
        self.plan = plan
        last = np.repeat(np.array([[0.0], [1.0], [np.inf]], dtype=np.float32), plan.num_bins, axis=1)
        self._kept = Kept(optimizer, "report", (last, np.zeros((2, plan.num_bins), dtype=np.float32)))

    def write(self, decision: Decision) -> None:
        """Leave a decision behind; nothing waits for the device."""
        _, counts = self._kept.read()
        scaled = ops.logical_and(decision.finite_B, decision.scale_B < 1)
        norm_B = ops.where(decision.finite_B, decision.norm_B, float("inf"))
        rows = [ops.cast(row, "float32") for row in (norm_B, decision.scale_B, decision.limit_B)]
        outcomes = [ops.cast(row, "float32") for row in (scaled, ops.logical_not(decision.finite_B))]
        self._kept.write((ops.stack(rows), counts + ops.stack(outcomes)))

    def counts(self) -> np.ndarray:
        """Copy to the host (2, B): how often each bin was scaled, and how often it was zeroed, since the beginning."""
        return np.array(ops.convert_to_numpy(self._kept.variables[1]))

    def record(self, step: int) -> StepRecord:
        """Copy the last decision to the host."""
        last = torch.from_numpy(np.array(ops.convert_to_numpy(self._kept.variables[0]), dtype=np.float64))
        norm, scale_B, limit_B = last
        finite_B = norm.isfinite()
        decision = Decision(
            self.plan, norm.where(finite_B, torch.zeros_like(norm)), finite_B, scale_B, (("bin", None, limit_B),)
        )
        return StepRecord(step, norm.square(), decision)
