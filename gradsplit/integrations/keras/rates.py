"""The learning rate as the optimizer has it now, and its pace: rate now / largest so far."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from .state import Kept

__all__ = ["Rates", "follows_gradient"]

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
