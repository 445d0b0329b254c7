"""What a splitting optimizer keeps between steps, in its own variables, so that Keras saves, loads and compiles it."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import backend, ops, tree

from ...xp import namespace

__all__ = ["Kept", "Rates", "accumulator_dtype"]


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

    def reach(self, rate: Any) -> Any:
        """Return the longest update per length of gradient of SGD, rate / (1 - momentum), 0-d."""
        return rate / (1.0 - getattr(self._optimizer, "momentum", 0.0))
