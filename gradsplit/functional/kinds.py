"""What each array is to the share step, by its shape, by its layer, or by what the user says of its path."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from .arrays import Oriented

__all__ = ["KINDS", "WRITTEN", "ArrayKind", "Choice", "array_kinds", "by_shape", "check_patterns", "chosen", "of_width"]

Kindred = TypeVar("Kindred", bound="ArrayKind")

Choice = str | Mapping[str, Any] | Callable[[str, tuple[int, ...]], Any] | None
"""One answer for all arrays, answers by patterns of paths, or a function (path, shape) -> answer or None."""


@dataclass(frozen=True)
class ArrayKind:
    """How the share step treats one array.

    Attributes:
        name: "matrix", "embedding" or "vector".
        direction: "orthogonal" or "adam".
        share: times the share of the step.
        least: the smallest root mean square that a row counts as, weight units; less in wide matrices, see `of_width`.
        longest: no row grows beyond this length, or its first one; inf: no limit.
        blocks: equal blocks of rows, each made orthogonal by itself.
    """

    name: str
    direction: str
    share: float = 1.0
    least: float = 0.1
    longest: float = math.inf
    blocks: int = 1


WRITTEN = 1.01
"""A row that is found this many times its longest length was written from outside."""

KINDS: dict[str, ArrayKind] = {
    "matrix": ArrayKind("matrix", "orthogonal", longest=3.0),
    "embedding": ArrayKind("embedding", "adam"),
    "vector": ArrayKind("vector", "adam", share=1 / 3, least=1.0),
}
"""The kinds by name, with the constants of GSO: for torch and for every other framework."""

WIDE = 64
"""The smaller side of a matrix beyond which its short rows count as less."""

_DIRECTIONS = ("orthogonal", "adam")


def array_kinds(
    oriented: Oriented,
    *,
    kinds: Choice = None,
    direction: Choice = "auto",
    blocks: Choice = None,
    known: Mapping[str, tuple[str | None, int]] | None = None,
    call: str = "array_kinds",
) -> tuple[ArrayKind, ...]:
    """Return the kind of each array of a layout.

    An array of one dimension or none is a vector. One whose rows have a single entry, and one of three dimensions or
    more with a single row, is an embedding. All others are matrices. Where axis 0 counts rows beside other axes, the
    array is a stack of ``shape[0]`` matrices, each of which is made orthogonal by itself.

    Args:
        oriented: the arrays; their names are the paths.
        kinds: "matrix", "embedding" or "vector", by pattern or function.
        direction: "auto", "orthogonal" or "adam", for all, by pattern or by function.
        blocks: numbers of equal blocks of rows, by pattern or function, for example ``{"*.qkv.kernel": 3}``.
        known: path -> (kind or None, blocks), from what the framework knows of the layers; what the user says goes
            first.
        call: the caller's name, for errors.

    Raises:
        ValueError: an unknown kind or direction, "orthogonal" for a vector, a pattern that matches nothing, blocks that
            do not divide the rows.

    >>> from gradsplit.functional import Orientation
    >>> arrays = Oriented.of({"dense.kernel": (3, 8), "dense.bias": (8,)}, Orientation())
    >>> [kind.direction for kind in array_kinds(arrays)]
    ['orthogonal', 'adam']
    """
    names = oriented.layout.names
    for argument, choice in (("kinds", kinds), ("direction", direction), ("blocks", blocks)):
        check_patterns(argument, choice, names, what="path", call=call)
    made = []
    for t, (name, shape) in enumerate(zip(names, oriented.shapes, strict=True)):
        turned = oriented.layout.shapes[t]
        usual, parts = (known or {}).get(name, (None, _stacked(oriented, t)))
        said = chosen(kinds, name, shape)
        kind = KINDS[_one_of(KINDS, said or usual or by_shape(turned), "kinds", name, call)]
        towards = chosen(direction, name, shape)
        if towards not in (None, "auto"):
            kind = replace(kind, direction=_one_of(_DIRECTIONS, towards, "direction", name, call))
        if kind.direction == "orthogonal" and len(shape) < 2:
            raise ValueError(
                f"{call}(direction='orthogonal'): expected an array with two dimensions or more, got {name!r} of shape "
                f"{shape}. Use direction='auto', or name another direction for this array."
            )
        wanted = chosen(blocks, name, shape)
        num, rows = parts if wanted is None else wanted, turned[0] if len(turned) > 1 else 1
        if not isinstance(num, int) or num < 1 or rows % num:
            raise ValueError(
                f"{call}(blocks={{…: {num!r}}}): expected a number that divides the {rows} rows of {name!r}. Cut it "
                "into another number of equal blocks."
            )
        made.append(of_width(replace(kind, blocks=num), rows, math.prod(turned[1:])))
    return tuple(made)


def of_width(kind: Kindred, rows: int, cols: int) -> Kindred:
    """Return the kind of a matrix of this size: where both sides are wide, a short row counts as less.

        least = 0.1 min(1, sqrt(64 / min(rows, cols)))

    An orthogonal direction moves min(rows, cols) directions at once, each by as much. A least length of 0.1 sqrt n in
    every matrix would move an output by sqrt(n / 64) times as much as at a width of 64.

    Args:
        kind: what the array is; only matrices change.
        rows: of the whole array, with all of its blocks.
        cols: of the array.

    >>> sizes = ((64, 64), (256, 256), (16, 256))
    >>> [round(of_width(KINDS["matrix"], *size).least * size[1] ** 0.5, 3) for size in sizes]
    [0.8, 0.8, 1.6]
    """
    side = min(rows // kind.blocks, cols)
    if kind.name != "matrix" or side <= WIDE:
        return kind
    return replace(kind, least=KINDS[kind.name].least * math.sqrt(WIDE / side))


def by_shape(turned: tuple[int, ...]) -> str:
    """Return the kind of an array, by its shape in PyTorch's order alone.

    Where a row has a single entry, its sign alone would be left of an orthogonal direction.

    >>> [by_shape(shape) for shape in ((4,), (4, 3), (4, 1), (1, 5, 3))]
    ['vector', 'matrix', 'embedding', 'embedding']
    """
    if len(turned) < 2:
        return "vector"
    few = math.prod(turned[1:]) == 1 or (len(turned) > 2 and turned[0] == 1)
    return "embedding" if few else "matrix"


def _stacked(oriented: Oriented, t: int) -> int:
    """How many matrices lie in an array one after the other, along axis 0."""
    rows, _ = oriented.orders[t]
    return oriented.shapes[t][0] if len(rows) > 1 and rows[0] == 0 else 1


def chosen(choice: Any, name: str, more: Any) -> Any:
    """Return what a choice says of a name: the word for all, the first pattern that fits, or the function's answer.

    >>> chosen("adam", "fc.bias", None), chosen({"fc.*": 3}, "fc.bias", None), chosen({"fc.*": 3}, "up.bias", None)
    ('adam', 3, None)
    """
    if choice is None or isinstance(choice, str):
        return choice
    if callable(choice):
        return choice(name, more)
    return next((value for pattern, value in choice.items() if fnmatchcase(name, pattern)), None)


def check_patterns(argument: str, choice: Any, names: Sequence[str], *, what: str, call: str) -> None:
    """Refuse patterns that are no strings, and those that match none of the names, if there are names.

    Raises:
        ValueError: such a pattern; ``what`` is the word for what it was to match.
    """
    for pattern, value in choice.items() if isinstance(choice, Mapping) else ():
        if not isinstance(pattern, str):
            raise ValueError(
                f"{call}({argument}={{{pattern!r}: …}}): expected name patterns, got {type(pattern).__name__}. Write "
                f"for example {{'*.weight': {value!r}}}."
            )
        if names and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{call}({argument}={{{pattern!r}: …}}): expected a pattern that matches a {what}, got one that "
                f"matches none of {len(names)}, for example not {names[0]!r}. Patterns are those of fnmatch."
            )


def _one_of(known: Any, said: Any, argument: str, name: str, call: str) -> str:
    if said not in known:
        raise ValueError(f"{call}({argument}={said!r}): expected one of {', '.join(known)} for {name!r}.")
    return str(said)
