"""Tensors inside nested outputs: tuples, lists, dictionaries, dataclasses and mappings that are dataclasses.

A module may return a tensor, `(output, (h, c))`, a `ModelOutput` or a dataclass of its own. A joint is one
tensor inside such an output, so every place that reads or replaces joints goes through the two functions
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in a nested value with its place.

    Args:
        value: a tensor, a container of tensors, or anything else (which holds none).
        path: place of `value` itself; the tensor of a plain output has the empty place.

    Yields:
        Pairs (place, tensor), for example ("[1][0]", h) for h in `(output, (h, c))`.

    >>> [place for place, _ in tensors_in((torch.zeros(1), {"h": torch.zeros(1)}))]
    ['[0]', '[1].h']
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}.{field.name}")


def replace_tensors(value: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """Rebuild a nested value with every tensor passed through `change(place, tensor)`.

    A container none of whose tensors changes is returned as it is (the same object), so that caches and other
    containers with an identity of their own are left alone.

    Args:
        value: as in `tensors_in`.
        change: the new tensor for a place; returning its argument keeps the old one.
        path: place of `value` itself.

    Returns:
        The same structure; a dataclass or mapping keeps its type.
    """
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        new = {key: replace_tensors(item, change, f"{path}.{key}") for key, item in value.items()}
        if all(new[key] is value[key] for key in new):
            return value
        if isinstance(value, dict) and type(value) is not dict:
            return type(value)(**{str(key): item for key, item in new.items()})
        return new
    if isinstance(value, (tuple, list)):
        items = [replace_tensors(item, change, f"{path}[{index}]") for index, item in enumerate(value)]
        if all(new_item is old for new_item, old in zip(items, value, strict=True)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.init]
        changed = {
            field.name: replace_tensors(getattr(value, field.name), change, f"{path}.{field.name}") for field in fields
        }
        if all(changed[name] is getattr(value, name) for name in changed):
            return value
        return dataclasses.replace(value, **changed)
    return value


def carries_signal(tensor: Tensor) -> bool:
    """Whether a signal can pass through this tensor: floating and part of the autograd graph."""
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping by keyword, a tuple or list by position, anything else as one argument.

    Args:
        model: the module to call.
        batch: its inputs (inputs only; with labels in the batch give a `loss_fn(model, batch)` instead).

    Returns:
        What the model returns.

    Raises:
        TypeError: the model does not take the batch that way.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
            return model(*batch)
        return model(batch)
    except TypeError as error:
        raise TypeError(
            f"joints(model, batch={type(batch).__name__}): the model could not be called with the batch: {error}. "
            "A batch holds the inputs only; where it holds labels too, pass loss_fn=lambda model, batch: scalar."
        ) from error
