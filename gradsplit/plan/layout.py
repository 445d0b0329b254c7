"""The layout: ordered names and shapes of the tensors to be controlled, and their matrix view.

A layout knows no framework and no values, so the plan of a model that fits on no machine can be made from its shapes.

Matrix view, defined here once: a tensor is rows x columns, rows = dim 0 (the output units in PyTorch), columns = all
other dims flattened in row-major order. A 0-d or 1-d tensor is a single row.

    (64, 3, 7, 7)  ->  64 x 147        (10,)  ->  1 x 10        ()  ->  1 x 1
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Layout", "check_layout", "layout_of", "named_trainable", "one_device", "refuse_lazy"]


@dataclass(frozen=True)
class Layout:
    """Ordered names and shapes of tensors.

    Args:
        names: one per tensor, unique and not empty.
        shapes: one tuple of sizes >= 0 per tensor. Sizes are Python integers, so products never overflow.

    Raises:
        ValueError: no tensor, a name used twice, a size that is not an integer >= 0.

    >>> layout = Layout.from_shapes({"fc.weight": (4, 3), "fc.bias": (4,)})
    >>> layout.rows, layout.cols, layout.numels
    ((4, 1), (3, 4), (12, 4))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(
                f"Layout(names, shapes): expected one shape per name, got {len(self.names)} names and "
                f"{len(self.shapes)} shapes. Use Layout.from_shapes({{name: shape}})."
            )
        if not self.names:
            raise ValueError("Layout(): expected at least one tensor, got none. Pass the trainable tensors of a model.")
        seen: set[str] = set()
        for name, shape in zip(self.names, self.shapes, strict=True):
            if not isinstance(name, str) or not name:
                raise ValueError(f"Layout(): expected a non-empty string as a tensor's name, got {name!r}. Name it.")
            if name in seen:
                raise ValueError(
                    f"Layout(): expected unique names, got {name!r} twice. Prefix the names of each model or group."
                )
            seen.add(name)
            if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in shape):
                raise ValueError(
                    f"Layout(): expected sizes that are integers >= 0, got {shape} at {name!r}. Pass the tensor's "
                    "shape."
                )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Iterable[int]]) -> Layout:
        """Make a layout from ``{name: shape}``, in the mapping's order."""
        return cls(tuple(shapes), tuple(tuple(map(_as_integer, shape)) for shape in shapes.values()))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Rows of each tensor's matrix view."""
        return tuple(shape[0] if len(shape) > 1 else 1 for shape in self.shapes)

    @cached_property
    def cols(self) -> tuple[int, ...]:
        """Columns of each tensor's matrix view."""
        return tuple(math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape) for shape in self.shapes)

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def num_elements(self) -> int:
        """Elements of all tensors together, an exact integer of any size."""
        return sum(self.numels)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name these names and shapes, in this order."""
        text = repr((self.names, self.shapes))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)


def _as_integer(size: Any) -> Any:
    """A Python integer for an integer of any library; anything else as it is, so that `Layout` refuses it."""
    return operator.index(size) if hasattr(size, "__index__") and not isinstance(size, bool) else size


def named_trainable(model_or_named_parameters: Any, *, call: str = "layout_of") -> list[tuple[str, Any]]:
    """Return ``[(name, parameter)]`` of what can be controlled: trainable, named once, in a stable order.

    Frozen parameters (``requires_grad=False``, integer ones among them) are left out; a tied parameter appears once,
    under its first name. The prefix that ``torch.compile`` puts before names is left out.

    Args:
        model_or_named_parameters: a module with ``named_parameters()``, a mapping, or an iterable of pairs.
        call: the caller's name, for errors.

    Raises:
        TypeError: bare tensors without names, or something that holds no parameters at all.
        ValueError: nothing trainable, a name used twice, a lazy parameter.
    """
    pairs, what, advice = _pairs_of(model_or_named_parameters, call=call)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"{call}(…): expected a model or pairs (name, parameter), got an item of type "
                f"{type(pair).__name__}. Pass model.named_parameters() instead of model.parameters()."
            )
        refuse_lazy(pair[0], pair[1], call=f"{call}(…)")
        if not hasattr(pair[1], "shape"):
            raise TypeError(
                f"{call}(…): expected a tensor at {pair[0]!r}, got {type(pair[1]).__name__}. Pass pairs (name, "
                "parameter), as model.named_parameters() gives them."
            )
    if not pairs:
        raise ValueError(f"{call}(…): expected parameters, got none from {what}. {advice}")
    seen: set[int] = set()
    trainable = []
    for name, parameter in pairs:
        if getattr(parameter, "requires_grad", True) and id(parameter) not in seen:
            seen.add(id(parameter))
            trainable.append((name.replace("_orig_mod.", ""), parameter))
    if not trainable:
        raise ValueError(
            f"{call}(…): expected a trainable parameter, got {len(pairs)} frozen ones from {what}. "
            "Set requires_grad=True on what you train before you split."
        )
    return trainable


def _pairs_of(source: Any, *, call: str) -> tuple[list[Any], str, str]:
    """What ought to be pairs (name, parameter), where they come from in words, and what to do if there are none."""
    if isinstance(source, type):
        raise TypeError(
            f"{call}(…): expected a model or pairs (name, parameter), got the class {source.__name__}. Make the model "
            f"first, as in model = {source.__name__}(…)."
        )
    if hasattr(source, "named_parameters"):
        advice = "Pass a model that has weights. Quantised layers keep theirs outside of the parameters."
        return list(source.named_parameters()), f"the {type(source).__name__}", advice
    if isinstance(source, Mapping):
        return list(source.items()), "the mapping", "Pass {name: parameter} with at least one parameter, or the model."
    if not isinstance(source, Iterable):
        raise TypeError(
            f"{call}(…): expected a model or pairs (name, parameter), got {type(source).__name__}. Pass the model, or "
            "list(model.named_parameters())."
        )
    advice = "A generator can be read only once: pass the model, or list(model.named_parameters())."
    return list(source), "the iterable", advice


def refuse_lazy(name: str, parameter: Any, *, call: str) -> None:
    """Refuse a parameter of a ``torch.nn.Lazy…`` module, which has no shape before the first batch."""
    if hasattr(type(parameter), "cls_to_become"):
        raise ValueError(
            f"{call}: expected parameters with shapes, got a lazy one at {name!r}. Run one batch through the model "
            "first."
        )


def check_layout(layout: Any, *, call: str) -> None:
    """Refuse what is no layout, such as the model itself.

    Raises:
        TypeError: something else; says how to make a layout of it.
    """
    if not isinstance(layout, Layout):
        what = "a class" if isinstance(layout, type) else type(layout).__name__
        raise TypeError(f"{call}({what}): expected a Layout. Write {call}(layout_of(model)).")


def layout_of(model: Any) -> Layout:
    """Return the layout of a model's trainable parameters, in the order of ``named_parameters()``.

    Args:
        model: a module, a mapping ``{name: parameter}``, or an iterable of ``(name, parameter)``.

    Raises:
        TypeError: parameters without names.
        ValueError: no parameters, or only frozen ones.

    >>> import torch
    >>> layout_of(torch.nn.Linear(3, 2)).names
    ('weight', 'bias')
    """
    pairs = named_trainable(model)
    return Layout(
        tuple(name for name, _ in pairs),
        tuple(tuple(int(size) for size in parameter.shape) for _, parameter in pairs),
    )


def one_device(pairs: list[tuple[str, Any]], *, call: str) -> Any:
    """Return the device of all tensors.

    Raises:
        ValueError: tensors on several devices; names the first that differs.
        TypeError: a tensor that is neither floating point nor complex.
    """
    device = pairs[0][1].device
    for name, tensor in pairs:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(
                f"{call}(…): expected floating-point parameters, got {tensor.dtype} at {name!r}. Leave it out."
            )
        if tensor.device != device:
            raise ValueError(
                f"{call}(…): expected all parameters on one device, got {pairs[0][0]!r} on {device} and {name!r} on "
                f"{tensor.device}. Make one splitter per device, from the pairs (name, parameter) that live there."
            )
    return device
