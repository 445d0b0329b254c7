"""What must hold of a run file's values before anything computes with them: files come from other people, too.

SQLite tells whether pages are whole, not whether their values mean anything. Each check raises a ValueError; the reader
adds the file's name (see `RunFile`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["check_about", "check_chunk", "check_meta", "check_outline", "check_thinning"]

_MOST_ROWS = 1 << 32  # of a chunk; a number beyond would be believed only to run out of memory
_WORD = re.compile(r"(?:[a-z]+@)?[a-z_]+(?::[a-z_]+=(?:[-+]?\d*\.?\d+(?:e[-+]?\d+)?|inf))*", re.IGNORECASE)
_LEVELS = ("root", "module", "tensor", "leaf")
_LISTS = {"names": str, "levels": str, "parents": int, "nodes_of_leaves": int, "tensors_of_leaves": str,
          "numel": float, "bins": int}  # fmt: skip


def check_meta(meta: Mapping[str, Any]) -> None:
    """Program, times and texts about the run are of their kinds; other keys are anybody's."""
    if "argv" in meta and not isinstance(meta["argv"], list):
        raise ValueError(f"expected a list of words in meta 'argv', got {meta['argv']!r:.80}")
    remarks = meta.get("remarks", [])
    if not isinstance(remarks, list) or not all(isinstance(one, dict) for one in remarks):
        raise ValueError(f"expected a list of objects in meta 'remarks', got {remarks!r:.80}")
    for one in remarks:
        texts = all(isinstance(one.get(key, ""), str) for key in ("kind", "where", "operation", "text"))
        if not texts or not all(_is(one.get(key, 0), int) for key in ("step", "stream")):
            raise ValueError(f"expected texts and whole numbers in a remark of meta 'remarks', got {one!r:.80}")
        if one.get("kind") == "samples":
            _check_samples(one)
    for key in ("started", "ended"):
        if key in meta and not (_is(meta[key], float) and 0 <= meta[key] < 1e11):
            raise ValueError(f"expected seconds since the epoch in meta {key!r}, got {meta[key]!r:.80}")


def _check_samples(remark: Mapping[str, Any]) -> None:
    """Every row is a pass, a sample, a layer, a ratio or nothing, and a number of layers."""
    rows = remark.get("rows", [])
    sound = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 5 for row in rows)
    sound = sound and all(
        all(_is(row[k], int) and 0 <= row[k] < 2**53 for k in (0, 1, 4))
        and isinstance(row[2], str)
        and (row[3] is None or _is(row[3], float))
        for row in rows
    )
    numbers = all(_is(remark.get(key, 0), int) for key in ("num", "num_passes", "batch", "num_unruled"))
    names = remark.get("unruled", [])
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not (
        sound
        and numbers
        and texts
        and all(isinstance(remark.get(key, ""), str) for key in ("why", "by"))
        and _is(remark.get("times", 1.0), float)
    ):
        raise ValueError(f"expected samples of a batch in a remark of meta 'remarks', got {remark!r:.80}")


def check_about(about: Any) -> None:
    """What a stream is about is a mapping, its counts are counts and its words of the budget are words."""
    if not isinstance(about, dict):
        raise ValueError(f"expected a mapping about the stream, got {about!r:.80}")
    names, order = about.get("names", []), about.get("forward_order", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a list of names in 'names' of the stream, got {names!r:.80}")
    if order and (not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(len(names))))):
        raise ValueError(f"expected every tensor once in 'forward_order' of the stream, got {order!r:.80}")
    for key in ("num_parameters", "num_bins"):
        if key in about and not _is(about[key], int):
            raise ValueError(f"expected a count in {key!r} of the stream, got {about[key]!r:.80}")
    words = about.get("words") or []
    if not isinstance(words, list) or not all(isinstance(word, str) and _WORD.fullmatch(word) for word in words):
        raise ValueError(f"expected a list of words of --budget in 'words' of the stream, got {words!r:.80}")


def check_outline(state: Any) -> None:
    """Names, levels and sizes fit together, and every node except the first has a parent before it: they are a tree."""
    if not isinstance(state, Mapping) or set(_LISTS) - set(state):
        raise ValueError(f"expected an outline with {', '.join(_LISTS)}, got {state!r:.80}")
    for key, kind in _LISTS.items():
        if not isinstance(state[key], list) or not all(_is(value, kind) for value in state[key]):
            raise ValueError(f"expected a list of {kind.__name__} in {key!r} of the outline, got {state[key]!r:.80}")
    num_nodes, num_leaves = len(state["names"]), len(state["nodes_of_leaves"])
    if not num_leaves or {len(state[key]) for key in ("levels", "parents")} != {num_nodes}:
        raise ValueError(
            f"expected a leaf, and one level and one parent per node, got {num_leaves} leaves, {num_nodes} nodes, "
            f"{len(state['levels'])} levels and {len(state['parents'])} parents"
        )
    if {len(state[key]) for key in ("tensors_of_leaves", "numel", "bins")} != {num_leaves}:
        raise ValueError(f"expected one tensor, size and count per leaf, got {num_leaves} leaves of other lengths")
    if set(state["levels"]) - set(_LEVELS):
        raise ValueError(f"expected levels of {', '.join(_LEVELS)}, got {sorted(set(state['levels']))!r:.80}")
    if state["parents"][0] != -1 or any(not 0 <= p < n for n, p in enumerate(state["parents"][1:], 1)):
        raise ValueError("expected a tree: every node after its parent, the root first")
    leaves = state["nodes_of_leaves"]
    if len(set(leaves)) != num_leaves or not all(0 <= node < num_nodes for node in leaves):
        raise ValueError("expected a node of its own for every leaf")
    if not all(0 <= value < 2**53 for value in itertools.chain(state["numel"], state["bins"])):
        raise ValueError("expected sizes and counts of bins from 0 to 2^53")


def check_chunk(chunk: Mapping[str, Any], widths: Mapping[str, int], *, controlled: bool) -> None:
    """Every column has one number per row, windows begin in order, and every column of the stream is there.

    Args:
        chunk: a row of the table of chunks, by column.
        widths: bytes per row of the columns that have one number per row.
        controlled: whether norms after control were kept.
    """
    num_rows, first = chunk["num_rows"], chunk["first_row"]
    if not (_is(num_rows, int) and 0 < num_rows < _MOST_ROWS and _is(first, int) and 0 <= first < 2**62):
        raise ValueError(f"expected a chunk of some rows, got {num_rows!r:.40} from {first!r:.40}")
    for name, width in widths.items():
        if not isinstance(chunk[name], bytes) or len(chunk[name]) != width * num_rows:
            raise ValueError(f"expected {width * num_rows} bytes of {name!r} in the chunk at row {first}")
    blobs = ("norm", "kept") if controlled else ("norm",)
    for name in (*blobs, *(n for n in ("starts", "peak", "scaled", "zeroed") if chunk[n] is not None)):
        if not isinstance(chunk[name], bytes):
            raise ValueError(f"expected bytes of {name!r} in the chunk at row {first}, got {chunk[name]!r:.40}")
    if chunk["starts"] is not None:
        start_W = np.frombuffer(chunk["starts"], dtype="<i8") if len(chunk["starts"]) % 8 == 0 else np.zeros(0)
        if not (len(start_W) and start_W[0] == 0 and start_W[-1] < num_rows and (start_W[1:] > start_W[:-1]).all()):
            raise ValueError(f"expected windows that begin one after the other in the chunk at row {first}")


def check_thinning(values: Mapping[str, Any]) -> None:
    """Everything about a thinning is a number."""
    wrong = [name for name, value in values.items() if not _is(value, float)]
    if wrong:
        raise ValueError(f"expected numbers about a thinning, got {values[wrong[0]]!r:.40} in {wrong[0]!r}")


def _is(value: Any, kind: type) -> bool:
    """Whether a plain value has this kind; a whole number is also a float, a truth value is neither."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
