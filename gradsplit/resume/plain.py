"""Trees of plain data: all that a checkpoint may hold, so that reading one never runs code from the file."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["CheckpointError", "as_before", "copied", "plain"]


class CheckpointError(RuntimeError):
    """A checkpoint is absent, torn, changed, or of another run; the text names file, expected and found.

    Whatever it was to be loaded into is as it was before.
    """


_LEAVES = (bool, int, float, str, type(None))


def plain(tree: Any, place: str) -> Any:
    """Return a tree of tensors, numbers, strings, None, lists, tuples and dicts that shares the tensors' memory.

    Subclasses of dict and list become dict and list, numpy's numbers and arrays become Python's and tensors.

    Args:
        tree: the data.
        place: where it stands, for the error.

    Raises:
        TypeError: anything else, or a tensor that this process holds a part of only.

    >>> plain({"a": (1, np.float64(0.5)), "b": Counter([3])}, "part")
    {'a': (1, 0.5), 'b': {3: 1}}
    """
    if isinstance(tree, Tensor):
        if hasattr(tree, "placements"):
            raise TypeError(
                f"{place}: expected whole tensors, got one that is sharded over processes. Save it with "
                "torch.distributed.checkpoint, or full_tensor() first."
            )
        if tree.is_meta or tree.is_nested or is_lazy(tree):
            kind = "on the meta device" if tree.is_meta else "nested" if tree.is_nested else "without a shape yet"
            raise TypeError(
                f"{place}: expected tensors with a shape and values, got one {kind}. Run a lazy module once before you "
                "save it, and save what a nested tensor is made of."
            )
        return tree.detach()
    if tree is None or isinstance(tree, bool):
        return tree
    # A member of an enumeration and a number of numpy become the plain number that they are underneath.
    if isinstance(tree, int):
        return int(tree)
    if isinstance(tree, float):
        return float(tree)
    if isinstance(tree, str):
        return str.__str__(tree)
    if isinstance(tree, np.generic):
        return plain(tree.item(), place)
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(tree))
    if isinstance(tree, dict):
        return {plain(key, f"{place} key"): plain(value, f"{place}[{key!r}]") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [plain(value, f"{place}[{i}]") for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    raise TypeError(
        f"{place}: expected tensors, numbers, strings, None, lists, tuples and dicts, got {type(tree).__qualname__}. "
        "Save what it is made of instead."
    )


def as_before(saved: Any, like: Any) -> Any:
    """Return saved data with the Counters and OrderedDicts that the living object has at the same places."""
    if isinstance(saved, dict) and isinstance(like, dict):
        return _same_kind({key: as_before(value, like.get(key)) for key, value in saved.items()}, like)
    if isinstance(saved, (list, tuple)) and isinstance(like, (list, tuple)) and len(saved) == len(like):
        return _same_items(saved, [as_before(one, other) for one, other in zip(saved, like, strict=True)])
    return saved


@torch.no_grad()
def copied(tree: Any, into: Any = None, *, wait: bool = True) -> Any:
    """Return a copy on the host that shares no memory with the tree; the memory of ``into`` is used where it fits.

    Without ``wait``, copies from a GPU go to pinned memory. They are ordered on the current stream before any later
    update, and may be read once that stream has reached them. A sharded tensor stays where it is.
    """
    if isinstance(tree, Tensor):
        fits = isinstance(into, Tensor) and into.shape == tree.shape and into.dtype == tree.dtype
        if not fits:
            on_host = not hasattr(tree, "placements")
            into = (
                torch.empty_like(tree, device="cpu", pin_memory=not wait and tree.device.type == "cuda")
                if on_host
                else torch.empty_like(tree)
            )
        return into.copy_(tree, non_blocking=not wait)
    if isinstance(tree, dict):
        old = into if isinstance(into, dict) else {}
        return _same_kind({key: copied(value, old.get(key), wait=wait) for key, value in tree.items()}, tree)
    if isinstance(tree, (list, tuple)):
        old_items = into if isinstance(into, (list, tuple)) and len(into) == len(tree) else [None] * len(tree)
        return _same_items(tree, [copied(value, old, wait=wait) for value, old in zip(tree, old_items, strict=True)])
    return tree if isinstance(tree, _LEAVES) else copy.deepcopy(tree)


def _same_items(like: Any, items: list[Any]) -> Any:
    """A list, a tuple or a named tuple."""
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def _same_kind(made: dict[Any, Any], like: dict[Any, Any]) -> dict[Any, Any]:
    """A dict as the Counter or OrderedDict that ``like`` is, with the versions that a module's state carries."""
    if type(like) not in (Counter, OrderedDict):
        return made
    same = type(like)(made)
    if hasattr(like, "_metadata"):
        same._metadata = like._metadata  # type: ignore[attr-defined]
    return same
