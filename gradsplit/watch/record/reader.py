"""RunFile: a recorded run read back, also while it is being written.

Shape suffixes: _R one entry per row, _L one per leaf, _W one per window of rows. Where nothing was thinned, a window
is one row.
"""

from __future__ import annotations

import difflib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...resume.actions import GuardAction
from .checks import check_about, check_chunk, check_meta, check_thinning
from .codec import pack_exact, to_float, unpack_bits, unpack_counts, unpack_exact, window_starts
from .outline import Outline
from .rows import Stream, Turns
from .run_file import RunFileError, open_to_read
from .writer import ROW_COLUMNS

__all__ = ["Event", "RunFile", "Series"]

# What reading damaged pages, deflated bytes, JSON or numbers may end in.
_DAMAGE = (sqlite3.Error, zlib.error, ValueError, TypeError, LookupError, OverflowError, RecursionError)


class Event(NamedTuple):
    """Something a reader wants to be told at once; ``leaf`` is None where the whole step is meant."""

    stream: int
    step: int
    time: float
    leaf: int | None
    kind: str
    num: int


@dataclass(frozen=True)
class Series:
    """All rows of one stream, or the last of them.

    Attributes:
        stream: what they are about.
        first_row: rows before these that were not read.
        step_R, time_R, loss_R, lr_R, own_scale_R, skipped_R, total_R, given_R: as in `Rows`.
        start_W: the first row of each window.
        norm_bits_WL, peak_bits_WL: bfloat16 as uint16; read them with `norm` and `peak`.
        kept_bits_WL: the smallest share that was kept; None where nothing was controlled.
        scaled_WL, zeroed_WL: bins scaled and zeroed, sums over the window; None where nothing was controlled.
    """

    stream: Stream
    first_row: int
    step_R: np.ndarray
    time_R: np.ndarray
    loss_R: np.ndarray
    lr_R: np.ndarray
    own_scale_R: np.ndarray
    skipped_R: np.ndarray
    total_R: np.ndarray
    given_R: np.ndarray
    start_W: np.ndarray
    norm_bits_WL: np.ndarray
    peak_bits_WL: np.ndarray
    kept_bits_WL: np.ndarray | None
    scaled_WL: np.ndarray | None
    zeroed_WL: np.ndarray | None

    @property
    def num_rows(self) -> int:
        """Rows recorded."""
        return len(self.step_R)

    @property
    def thinned(self) -> bool:
        """Whether a window stands for more than its first row anywhere."""
        return len(self.start_W) != len(self.step_R)

    @property
    def step_W(self) -> np.ndarray:
        """The step of each window's first row."""
        return self.step_R[self.start_W]

    def norm(self, leaves: Any = slice(None)) -> np.ndarray:
        """Return (W, …) float32 norms of each window's first row."""
        return to_float(self.norm_bits_WL[:, leaves])

    def peak(self, leaves: Any = slice(None)) -> np.ndarray:
        """Return (W, …) float32, the largest norms in each window."""
        return to_float(self.peak_bits_WL[:, leaves])

    def kept(self, leaves: Any = slice(None)) -> np.ndarray | None:
        """Return (W, …) float32, the smallest share kept in each window; None where nothing was controlled."""
        return None if self.kept_bits_WL is None else to_float(self.kept_bits_WL[:, leaves])

    def node_peak(self, node: int) -> np.ndarray:
        """Return (W,) float64 norms of a node of the outline, from the largest of its leaves."""
        with np.errstate(all="ignore"):
            norm_W: np.ndarray = np.sqrt(
                (self.peak(self.stream.outline.leaves_of_N[node]).astype(np.float64) ** 2).sum(axis=1)
            )
        return norm_W


class RunFile:
    """A run file, open for reading; a context manager.

    Args:
        path: the file; its writer may be alive, done or killed.

    Raises:
        RunFileError: no such file, not a run file, another version, or broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._connection: sqlite3.Connection = open_to_read(path)
        try:
            with self._whole():
                rows = self._query("SELECT key, value FROM meta")
                self.meta: dict[str, Any] = {key: json.loads(value) for key, value in rows}
                check_meta(self.meta)
        except RunFileError:
            self.close()
            raise

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Turn every error that damaged values cause into one that names the file and the remedy."""
        try:
            yield
        except _DAMAGE as error:
            raise RunFileError(
                f"run file {self.path}: expected whole pages and values, got {error}. The file is damaged; `sqlite3 "
                f"{self.path} '.recover'` may save a part of it."
            ) from error

    def _query(self, text: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._whole():
            return self._connection.execute(text, values).fetchall()

    @property
    def streams(self) -> list[Stream]:
        """One stream per recorded optimizer."""
        rows = self._query("SELECT id, optimizer, controlled, outline, about FROM stream ORDER BY id")
        with self._whole():
            return [self._stream(*row) for row in rows]

    @staticmethod
    def _stream(index: Any, optimizer: Any, controlled: Any, outline: str, about: str) -> Stream:
        described = json.loads(about)
        check_about(described)
        return Stream(int(index), str(optimizer), Outline.from_dict(json.loads(outline)), bool(controlled), described)

    def events(self, last: int = 1000) -> list[Event]:
        """Return the last events, oldest first."""
        found = self._query("SELECT stream, step, time, leaf, kind, count FROM event ORDER BY id DESC LIMIT ?", (last,))
        with self._whole():
            return [
                Event(int(stream), int(step), float(when), None if leaf is None else int(leaf), str(kind), int(num))
                for stream, step, when, leaf, kind, num in found
            ][::-1]

    def actions(self) -> list[GuardAction]:
        """Return what a guard did to the run, oldest first.

        Raises:
            RunFileError: the file holds something else in its place.
        """
        try:
            return [GuardAction.from_dict(values) for values in self.meta.get("guard", [])]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunFileError(
                f"run file {self.path}: expected the actions of a guard under 'guard', got something else ({error}). "
                "The file is damaged."
            ) from error

    def thinnings(self) -> list[dict[str, Any]]:
        """Return what was thinned, in order: rows, strides and bytes before and after."""
        names = (
            "time",
            "stream",
            "first_row",
            "num_rows",
            "stride_before",
            "stride_after",
            "bytes_before",
            "bytes_after",
        )
        rows = self._query(f"SELECT {', '.join(names)} FROM thinning ORDER BY id")
        found = [dict(zip(names, row, strict=True)) for row in rows]
        with self._whole():
            for thinning in found:
                check_thinning(thinning)
        return found

    def lengths(self, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
        """Return (K,) steps and (K, T) lengths of the weights before those steps; empty in files without them."""
        num_tensors = len(stream.about.get("names") or ())
        if not self._has("weight") or not num_tensors:
            return np.zeros(0, dtype=np.int64), np.zeros((0, num_tensors), dtype=np.float32)
        rows = self._query("SELECT step, length FROM weight WHERE stream = ? ORDER BY id", (stream.index,))
        with self._whole():
            lengths = [unpack_exact(length, "f4") for _, length in rows]
            if any(len(length_T) != num_tensors for length_T in lengths):
                raise ValueError(f"expected one length per tensor of {num_tensors} in the table 'weight'")
            step_K = np.array([int(step) for step, _ in rows], dtype=np.int64)
            return step_K, np.array(lengths, dtype=np.float32).reshape(len(rows), num_tensors)

    def _has(self, table: str) -> bool:
        return bool(self._query("SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?", (table,))[0][0])

    def turns(self, stream: Stream) -> Turns:
        """Return what GSO's steps did, as far as it was read; empty in files without it."""
        num_tensors, rows = len(stream.about.get("names") or ()), []
        if self._has("turn") and num_tensors:
            text = "SELECT step, factor, turned, at_limit, bounded FROM turn WHERE stream = ? ORDER BY step, id"
            rows = self._query(text, (stream.index,))
        with self._whole():
            tables = [[unpack_exact(blob, "f4") for blob in row[2:]] for row in rows]
            if any(len(values_T) != num_tensors for row in tables for values_T in row):
                raise ValueError(f"expected one number per tensor of {num_tensors} in the table 'turn'")
            made = np.array(tables, dtype=np.float32).reshape(len(rows), 3, num_tensors)
            step_K = np.array([int(row[0]) for row in rows], dtype=np.int64)
            factor_K = np.array([float(row[1]) for row in rows], dtype=np.float64)
            return Turns(stream, step_K, factor_K, made[:, 0], made[:, 1], made[:, 2])

    def norms(self, name: str = "all", *, stream: int = 0) -> np.ndarray:
        """Return the norms of a module, a tensor or a block of rows at every row, as floats.

        Norm of a node = square root of the sum of its leaves' squares, in gradient units, before the script's own clip.
        Where old rows were thinned there is one number per window, its largest.

        Args:
            name: a dotted name, ``"h.1.attn"`` or ``"h.1.attn.weight"``; "all" for the whole gradient.
            stream: the optimizer's number, in the order of first steps.

        Raises:
            KeyError: no such name; the text tells the nearest ones.
        """
        chosen = {one.index: one for one in self.streams}
        if stream not in chosen:
            raise KeyError(f"norms(stream={stream}): expected one of {sorted(chosen)}, the recorded optimizers.")
        names = list(chosen[stream].outline.names_N)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=5, cutoff=0.3)
            raise KeyError(
                f"norms({name!r}): expected a recorded module or tensor of {chosen[stream].optimizer} {stream}, got "
                f"another name. The nearest are {', '.join(near) or names[:5]}."
            )
        return self.series(chosen[stream]).node_peak(names.index(name))

    def steps(self, *, stream: int = 0) -> np.ndarray:
        """Return the step of each number that `norms` returns."""
        return self.series(next(one for one in self.streams if one.index == stream)).step_W

    def num_rows(self, stream: int) -> int:
        """Return how many rows of a stream are in the file."""
        (row,) = self._query("SELECT coalesce(max(first_row + num_rows), 0) FROM chunk WHERE stream = ?", (stream,))
        with self._whole():
            return int(row[0])

    def series(self, stream: Stream, *, last: int | None = None) -> Series:
        """Return the rows of a stream; with ``last``, at least so many of the newest if there are.

        Raises:
            RunFileError: no row yet.
        """
        after = 0 if last is None else self.num_rows(stream.index) - last
        names = (*ROW_COLUMNS, "first_row", "num_rows", "starts", "norm", "peak", "kept", "scaled", "zeroed")
        there = {row[0] for row in self._query("SELECT name FROM pragma_table_info('chunk')")}
        read = [name if name in there or name != "given" else "NULL" for name in names]
        chunks = [
            dict(zip(names, row, strict=True))
            for row in self._query(
                f"SELECT {', '.join(read)} FROM chunk WHERE stream = ? AND first_row + num_rows > ? ORDER BY first_row",
                (stream.index, after),
            )
        ]
        if not chunks:
            raise RunFileError(f"run file {self.path}: expected at least one recorded step, got none yet.")
        with self._whole():
            return self._joined(stream, chunks)

    @staticmethod
    def _joined(stream: Stream, chunks: list[dict[str, Any]]) -> Series:
        """The series of consecutive chunks."""
        widths = {name: np.dtype(dtype).itemsize for name, dtype in ROW_COLUMNS.items()}
        for chunk in chunks:
            if chunk["given"] is None and type(chunk["num_rows"]) is int and 0 < chunk["num_rows"] < 1 << 32:
                chunk["given"] = pack_exact(np.full(chunk["num_rows"], np.nan), "f4")  # an older file
            check_chunk(chunk, widths, controlled=stream.controlled)
        num_leaves = stream.outline.num_leaves
        before = np.cumsum([0, *(chunk["num_rows"] for chunk in chunks)])
        start_C = [window_starts(chunk) for chunk in chunks]
        per_row = {
            f"{name}_R": np.concatenate([unpack_exact(chunk[name], dtype) for chunk in chunks])
            for name, dtype in ROW_COLUMNS.items()
        }

        def bits(name: str, chunk: dict[str, Any], start: np.ndarray) -> np.ndarray:
            return unpack_bits(chunk[name], num_leaves, len(start))

        both = list(zip(chunks, start_C, strict=True))
        norms = [bits("norm", *each) for each in both]
        peaks = [
            norm if each[0]["peak"] is None else bits("peak", *each) for each, norm in zip(both, norms, strict=True)
        ]
        kept = [bits("kept", *each) for each in both] if stream.controlled else None

        def counts(name: str) -> np.ndarray | None:
            if not stream.controlled:
                return None
            return np.concatenate([unpack_counts(chunk[name], len(start), num_leaves) for chunk, start in both])

        norm_WL = np.concatenate(norms)
        same = all(chunk["peak"] is None for chunk in chunks)
        return Series(
            stream,
            chunks[0]["first_row"],
            **per_row,
            start_W=np.concatenate([start + at for start, at in zip(start_C, before, strict=False)]),
            norm_bits_WL=norm_WL,
            peak_bits_WL=norm_WL if same else np.concatenate(peaks),
            kept_bits_WL=None if kept is None else np.concatenate(kept),
            scaled_WL=counts("scaled"),
            zeroed_WL=counts("zeroed"),
        )
