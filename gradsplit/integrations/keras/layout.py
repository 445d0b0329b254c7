"""Keras variables as a layout: names from their paths, and rows that mean output units.

| layer | kernel | rows |
|---|---|---|
| Dense, LSTM, GRU (kernel and recurrent kernel) | (in, out), (in, 4 units) | the last axis |
| Conv1D, 2D, 3D | (…, in, out) | the last axis |
| Conv2DTranspose | (…, out, in) | the last axis, as PyTorch's (in, out, …) has its first |
| DepthwiseConv, SeparableConv | (…, in, multiplier) | the last two together |
| Embedding | (tokens, units) | the first axis: one row per token |
| MultiHeadAttention: query, key, value | (in, heads, units) | the last two together |
| biases of two or more axes | (2, 3 units), (heads, units) | the first axis |

Everything of one axis (biases, scales) is a single row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from keras import ops

from ...functional import Orientation, Oriented, orientation_of
from ...plan import Layout

__all__ = ["energies", "known_kinds", "layout_of", "names_of", "oriented_of"]


def names_of(variables: Iterable[Any]) -> list[str]:
    """Return dotted names from paths: "sequential/dense/kernel" -> "sequential.dense.kernel"; doubles get a number."""
    names: list[str] = []
    for variable in variables:
        name = str(getattr(variable, "path", None) or variable.name).partition(":")[0].replace("/", ".")
        double, number = name, 1
        while double in names:
            double, number = f"{name}.{number}", number + 1
        names.append(double)
    return names


def oriented_of(variables: list[Any], orientation: Any = None, *, call: str) -> Oriented:
    """Return the layout of variables beside their own axes.

    Args:
        variables: Keras or TensorFlow variables.
        orientation: a mapping from name patterns to the axis or axes that count output units, for layers that the
            table above does not know by name; None: the table.
        call: the caller's name, for errors.

    Raises:
        ValueError: no variables, an axis that a variable does not have.
    """
    if not variables:
        raise ValueError(f"{call}: expected trainable variables, got none. Build the model first.")
    shapes = {
        name: tuple(int(size) for size in variable.shape)
        for name, variable in zip(names_of(variables), variables, strict=True)
    }
    given = orientation_of({} if orientation is None else orientation, call=call)
    known = tuple((_exactly(name), _axes_of(name, shape)) for name, shape in shapes.items() if _axes_of(name, shape))
    if orientation is None or isinstance(orientation, Mapping):
        given = Orientation(given.rows, given.named[: len(orientation or {})] + known)
    return Oriented.of(shapes, given)


def _axes_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that count the rows of a layer's variable where these are not the last axis alone."""
    *layers, own = name.split(".")
    layer = layers[-1] if layers else ""
    if len(shape) < 2:
        return ()
    if own.endswith("embeddings") or "bias" in own:
        return (0,)
    if own == "depthwise_kernel" or (own == "kernel" and layer.startswith("depthwise_conv")):
        return (-2, -1)
    if own == "kernel" and layer in ("query", "key", "value") and len(shape) == 3:
        return (1, 2)
    return ()


def known_kinds(oriented: Oriented) -> dict[str, tuple[str | None, int]]:
    """Return what layers say of their variables: name -> (kind or None, number of matrices in it).

    Tables of Embedding are embeddings. Biases of two axes (GRU, attention) are vectors, one per row. A depthwise kernel
    is one small matrix per input channel. Shapes alone tell the kinds of all other variables.
    """
    known: dict[str, tuple[str | None, int]] = {}
    for name, shape, (rows, _) in zip(oriented.layout.names, oriented.shapes, oriented.orders, strict=True):
        own, rank = name.rpartition(".")[2], len(shape)
        if rank < 2:
            continue
        if own.endswith("embeddings"):
            known[name] = "embedding", 1
        elif "bias" in own:
            known[name] = "vector", 1
        elif rank > 2 and rows == (rank - 2, rank - 1) and _axes_of(name, shape) == (-2, -1):
            known[name] = None, shape[-2]
    return known


def _exactly(name: str) -> str:
    """A pattern that fits this name alone."""
    return name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")


def layout_of(model: Any, orientation: Any = None) -> Layout:
    """Return the layout of a built model's trainable variables, shapes turned to (out, in, …), on which plans are made.

    Args:
        model: a built model or layer, or a list of variables.
        orientation: see `split`.

    Raises:
        ValueError: nothing trainable, for example because the model is not built.

    >>> import keras
    >>> layout_of(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="fc")])).shapes
    ((2, 3), (2,))
    """
    return oriented_of(_variables_of(model), orientation, call="layout_of(…)").layout


def energies(model: Any, gradients: Iterable[Any], orientation: Any = None) -> dict[str, np.ndarray]:
    """Return squared gradients by name in the layout's shapes: what `gradsplit.lbf` cuts by.

    Average them over a few batches, then pass ``plan=gradsplit.lbf(layout_of(model), energy)``.

    Args:
        model: see `layout_of`.
        gradients: one per trainable variable, in order; None counts as zeros.
        orientation: see `split`.

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False, name="fc")])
    >>> [energy] = energies(model, [keras.ops.convert_to_tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])]).values()
    >>> energy
    array([[1., 0., 9.],
           [4., 0., 0.]])
    """
    variables = _variables_of(model)
    oriented = oriented_of(variables, orientation, call="energies(…)")
    made = {}
    for t, (name, variable, gradient) in enumerate(zip(oriented.layout.names, variables, gradients, strict=True)):
        array = np.zeros(variable.shape) if gradient is None else ops.convert_to_numpy(gradient).astype(np.float64)
        made[name] = oriented.turned(t, array) ** 2
    return made


def _variables_of(model: Any) -> list[Any]:
    return list(getattr(model, "trainable_variables", model))
