"""What each tensor is to the share step: its rows, its direction, its share, its blocks.

A tensor is recognised by the module that owns it and by its shape, never by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..functional.kinds import KINDS, ArrayKind, by_shape, check_patterns, chosen, of_width
from ..plan import Plan
from .directions import DIRECTIONS

__all__ = ["Kind", "check_names", "kinds_of", "owners_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Box = tuple[int, int, int, int]
"""A block of a matrix: first and last row, first and last column, half open."""


@dataclass(frozen=True)
class Kind(ArrayKind):
    """How the share step treats one tensor: an `ArrayKind`, whose constants are those of every framework, and a form.

    Attributes:
        rows, cols: the matrix that it is seen as; each row moves by a share of its own length.
        boxes: blocks of other forms, in place of ``blocks``.
        is_complex: the entries are complex numbers.
    """

    rows: int = 0
    cols: int = 0
    boxes: tuple[Box, ...] = ()
    is_complex: bool = False


def owners_of(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Return the first module that owns each parameter, and its name there, by ``id`` of the parameter.

    A tied parameter belongs to an embedding if one of its owners is one, since rows that are rarely used must keep
    Adam's steps.
    """
    found: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            known = found.get(id(parameter))
            if known is None or (isinstance(module, _EMBEDDINGS) and not isinstance(known[0], _EMBEDDINGS)):
                found[id(parameter)] = (module, name)
    return found


def _usual(parameter: Tensor, owner: tuple[nn.Module, str] | None) -> Kind:
    """Return what a tensor is, by its owner and its shape."""
    shape, module = tuple(int(size) for size in parameter.shape), owner[0] if owner else None
    rows, cols = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    name, blocks = by_shape(shape), 1
    if len(shape) > 1 and isinstance(module, _EMBEDDINGS):
        name = "embedding"
    elif name == "embedding" and cols != 1:  # positions (1, T, d), class tokens; or one channel of a convolution
        name = "matrix" if _has_kernel(module) else name
        rows, cols = (rows, cols) if _has_kernel(module) else (math.prod(shape[:-1]), shape[-1])
    if isinstance(module, _CONVOLUTIONS):
        blocks = module.groups if name == "matrix" and rows % module.groups == 0 else 1
    elif isinstance(module, nn.MultiheadAttention) and owner is not None and owner[1] == "in_proj_weight":
        blocks = 3  # queries, keys and values are three matrices
    elif name == "matrix" and len(shape) == 3 and module is not None and not _has_kernel(module):
        rows, cols, blocks = shape[0] * shape[1], shape[2], shape[0]  # experts (E, out, in)
    constants = {**vars(KINDS[name]), "blocks": blocks}
    return Kind(**constants, rows=rows, cols=cols, is_complex=parameter.is_complex())


def _has_kernel(module: nn.Module | None) -> bool:
    """Whether a module is some convolution, whose weight is one matrix over input channels and places."""
    return hasattr(module, "kernel_size")


def kinds_of(
    pairs: list[tuple[str, Tensor]],
    owners: Mapping[int, tuple[nn.Module, str]],
    direction: str | Mapping[str, str] | Callable[[str, Tensor], str | None],
    blocks: Plan | Mapping[str, int] | None,
) -> list[Kind]:
    """Return the kind of each parameter.

    Args:
        pairs: (name, parameter).
        owners: from `owners_of`; empty where no module was given, and shapes alone decide.
        direction: "auto", the name of a direction for all tensors, a mapping from name patterns to directions, or a
            function (name, parameter) -> direction or None; what it leaves open is decided as by "auto".
        blocks: a plan whose bins are made orthogonal one by one, or a mapping from name patterns to numbers of equal
            blocks of rows, for example ``{"*.qkv.weight": 3}``.

    Raises:
        ValueError: an unknown direction, one without a rule for a tensor, blocks that do not divide the rows or that
            lie in several tensors.

    >>> kinds_of([("w", nn.Linear(2, 6).weight)], {}, "auto", {"w": 3})[0].blocks
    3
    """
    kinds = [_usual(parameter, owners.get(id(parameter))) for _, parameter in pairs]
    for i, (name, parameter) in enumerate(pairs):
        said = chosen(direction, name, parameter)
        if said is None or direction == "auto":
            continue
        if said not in DIRECTIONS:
            raise ValueError(
                f"GSO(direction={said!r}): expected one of auto, {', '.join(DIRECTIONS)} for {name!r}. Register a "
                "direction of your own with gradsplit.optim.directions.register."
            )
        refusal = DIRECTIONS[said].refuses(tuple(parameter.shape))
        if refusal:
            raise ValueError(
                f"GSO(direction={said!r}): expected {refusal}, got {name!r} of shape {tuple(parameter.shape)}. "
                "Use direction='auto', or name another direction for this tensor."
            )
        kinds[i] = replace(kinds[i], direction=said)
    cut = [_cut(kind, name, blocks) for kind, (name, _) in zip(kinds, pairs, strict=True)]
    return [of_width(kind, kind.rows, kind.cols) for kind in cut]


def check_names(direction: Any, blocks: Any, names: list[str]) -> None:
    """Refuse directions and blocks of no kind, and those that name none of the parameters.

    Args:
        direction: as given by the user.
        blocks: as given by the user.
        names: of all parameters that they are for; empty: only the types are looked at.

    Raises:
        ValueError: a type that says nothing, a pattern that matches no name, a plan of other tensors.
    """
    if not (isinstance(direction, (str, Mapping)) or callable(direction)):
        raise ValueError(
            f"GSO(direction={direction!r}): expected 'auto', a direction's name, a mapping or a function, got "
            f"{type(direction).__name__}. Directions are {', '.join(DIRECTIONS)}."
        )
    if not (blocks is None or isinstance(blocks, (Plan, Mapping))):
        raise ValueError(
            f"GSO(blocks={blocks!r}): expected a plan, or a mapping from name patterns to numbers of blocks, got "
            f"{type(blocks).__name__}. Write for example {{'*.qkv.weight': 3}}."
        )
    if names and isinstance(blocks, Plan) and not set(names) & set(blocks.layout.names):
        raise ValueError(
            f"GSO(blocks={blocks!r}): expected a plan of this model, got one without any of its {len(names)} tensors, "
            f"for example without {names[0]!r}. Make the plan from this model, and pass the module or named parameters."
        )
    for argument, choice in (("direction", direction), ("blocks", blocks)):
        check_patterns(argument, choice, names, what="parameter", call="GSO")


def _cut(kind: Kind, name: str, blocks: Plan | Mapping[str, int] | None) -> Kind:
    """Return the kind with the blocks that the user has asked for."""
    if blocks is None:
        return kind
    if isinstance(blocks, Mapping):
        num = chosen(blocks, name, None)
        if num is None:
            return kind
        if not isinstance(num, int) or isinstance(num, bool) or num < 1 or kind.rows % num:
            raise ValueError(
                f"GSO(blocks={{…: {num!r}}}): expected a number that divides the {kind.rows} rows of {name!r}. Cut it "
                "into another number of equal blocks."
            )
        return replace(kind, blocks=num)
    if name not in blocks.layout.names:
        return kind
    t = blocks.layout.names.index(name)
    at = (blocks.tensor_K == t).nonzero()[0]
    if any((blocks.tensor_K[blocks.bin_K == b] != t).any() for b in blocks.bin_K[at]):
        raise ValueError(
            f"GSO(blocks={blocks!r}): expected bins inside one tensor each, got a bin of {name!r} and another tensor. "
            "Use a plan whose bins are parts of matrices, for example gradsplit.lbf."
        )
    if blocks.layout.rows[t] * blocks.layout.cols[t] != kind.rows * kind.cols or blocks.layout.rows[t] != kind.rows:
        raise ValueError(
            f"GSO(blocks={blocks!r}): expected a plan of this model, got {blocks.layout.shapes[t]} for {name!r}, which "
            f"is seen as {kind.rows} x {kind.cols} here. Make the plan from this model."
        )
    columns = (blocks.row_start_K, blocks.row_stop_K, blocks.col_start_K, blocks.col_stop_K)
    boxes = tuple((int(columns[0][k]), int(columns[1][k]), int(columns[2][k]), int(columns[3][k])) for k in at)
    return replace(kind, boxes=boxes, blocks=1)
