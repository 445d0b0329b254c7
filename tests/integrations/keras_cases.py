"""The shared case's arrays as Keras variables and tensors, output units last; imported where Keras is present."""

from __future__ import annotations

import keras
import numpy as np

from tests.functional.cases import LAYOUT, turned, weights


def variables(arrays=None):
    """The shared case's weights as Keras variables, output units last."""
    arrays = turned(weights()) if arrays is None else arrays
    return [keras.Variable(array, name=name) for name, array in zip(LAYOUT.names, arrays, strict=True)]


def tensors(arrays):
    return [keras.ops.convert_to_tensor(np.asarray(array, dtype=np.float32)) for array in arrays]


def values(held):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in held]


def last_scales(optimizer):
    return optimizer.split_report.record(0).decision.scale_B.numpy()


UNITS = np.array([[30.0, 0.3, 3.0], [40.0, 0.4, 4.0]])  # columns of length 50, 0.5 and 5
BOUNDED = np.array([[0.6, 0.3, 0.6], [0.8, 0.4, 0.8]])  # each at most 1


def one_step(optimizer, gradient, start=None):
    """What one step makes of a kernel of two inputs and three units."""
    held = [keras.Variable(np.zeros((2, 3), "float32") if start is None else start, name="kernel")]
    optimizer.apply(tensors([gradient]), held)
    return values(held)[0]
