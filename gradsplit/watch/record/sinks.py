"""Where rows go: the protocol of a sink, and the recorder that feeds any number of them off the training thread."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...plan import Plan
from ...resume.actions import GuardAction
from ...sources.observe import SampleWatch
from ...split import ShareRecord, StepRecord
from .outline import Outline
from .rows import Rows, Stream, Turns
from .run_file import tell
from .samples import SampleReader

__all__ = ["RowBuffer", "Recorder", "RowSink", "next_reading", "summed_up"]

_LARGEST = 3.4028234e38  # of float32: a finite norm is recorded as finite


def next_reading(step: int) -> int:
    """Return the step of the next thin reading after one: every 16 steps at first, later 1/64 of the run.

    >>> next_reading(32), next_reading(6400)
    (48, 6500)
    """
    return step + max(16, step // 64)


class RowBuffer:
    """A table on the device, filled row by row; `take` copies it to the host in a few transfers.

    Args:
        stream: what the rows are about.
        device: where the norms are.
        capacity: rows; `full` says when to take them.
    """

    def __init__(self, stream: Stream, device: torch.device, *, capacity: int = 64) -> None:
        self.stream, self.device, self.capacity = stream, device, capacity
        self._norm = self._table()
        self._kept = self._table() if stream.controlled else None
        # Counts as float32: exact below 2^24 bins per leaf, and one dtype to copy.
        self._scaled = self._table() if stream.controlled else None
        self._zeroed = self._table() if stream.controlled else None
        self._numbers: list[tuple[int, float, tuple[float | Tensor, ...]]] = []

    def _table(self) -> Tensor:
        return torch.empty(self.capacity, self.stream.outline.num_leaves, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def full(self) -> bool:
        """Whether the next row has no place."""
        return len(self) == self.capacity

    @torch.no_grad()
    def add(
        self,
        step: int,
        squares_L: Tensor,
        *,
        after_L: Tensor | None = None,
        scaled_L: Tensor | None = None,
        zeroed_L: Tensor | None = None,
        loss: float | Tensor = float("nan"),
        lr: float | Tensor = float("nan"),
        own_scale: float | Tensor = 1.0,
        skipped: float | Tensor = 0.0,
        given: float | Tensor = float("nan"),
    ) -> None:
        """Add one row.

        Args:
            step: the optimizer's step.
            squares_L: (L,) sums of squares as measured, any float dtype, on the device.
            after_L: (L,) sums of squares after control, if controlled.
            scaled_L: (L,) bins scaled, if controlled.
            zeroed_L: (L,) bins zeroed, if controlled.
            loss: a number or a 0-d tensor; a tensor is copied later.
            lr: likewise.
            own_scale: likewise; the script's own factor on all gradients.
            skipped: likewise; not 0 if the step is not made.
            given: likewise; how large the batch was, see `Rows`.
        """
        row = len(self)
        norm_L = torch.sqrt(squares_L)
        finite_L = norm_L.clamp(max=_LARGEST)
        self._norm[row].copy_(torch.where(torch.isfinite(norm_L), finite_L, norm_L))
        if self._kept is not None and after_L is not None and self._scaled is not None and self._zeroed is not None:
            share_L = torch.sqrt(after_L / squares_L)
            # nan: nothing was there (0/0, all of it kept), or it was not finite and has been zeroed.
            absent_L = torch.where(squares_L == 0, 1.0, 0.0).to(share_L.dtype)
            self._kept[row].copy_(torch.where(torch.isfinite(share_L), share_L, absent_L).clamp(max=1.0))
            self._scaled[row].copy_(torch.zeros_like(squares_L) if scaled_L is None else scaled_L)
            self._zeroed[row].copy_(torch.zeros_like(squares_L) if zeroed_L is None else zeroed_L)
        self._numbers.append((step, time.time(), (loss, lr, own_scale, skipped, given)))

    def take(self) -> Rows | None:
        """Return all rows on the host and start anew; None if there are none. Waits for the device."""
        count = len(self)
        if not count:
            return None
        numbers, self._numbers = self._numbers, []
        step, when, others = zip(*numbers, strict=True)
        loss, lr, own_scale, skipped, given = map(_numbers, zip(*others, strict=True))

        def host(table: Tensor | None) -> np.ndarray | None:
            return None if table is None else table[:count].cpu().numpy().copy()

        norm = host(self._norm)
        assert norm is not None
        return Rows(
            self.stream,
            np.array(step, dtype=np.int64),
            np.array(when),
            loss,
            lr,
            own_scale,
            (skipped != 0).astype(np.uint8),
            norm,
            host(self._kept),
            host(self._scaled),
            host(self._zeroed),
            given,
        )


def _numbers(values: tuple[float | Tensor, ...]) -> np.ndarray:
    """Copy numbers to the host, all tensors of one device in one transfer."""
    out = np.array([float("nan") if isinstance(value, Tensor) else value for value in values], dtype=np.float64)
    where = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if where:
        tensors = [values[i].detach().reshape(()).to(torch.float64) for i in where]  # type: ignore[union-attr]
        out[where] = torch.stack(tensors).cpu().numpy()
    return out


class RowSink(Protocol):
    """Takes rows on the host, a flush at a time: a run file, TensorBoard, Weights & Biases, MLflow, JSON lines.

    A sink that also has ``note(action)`` is told what a guard did; one with ``add_lengths(…)`` gets the lengths of the
    weights, one with ``add_turns(turns)`` what GSO's steps did, and one with ``remark(values)`` what was seen beside
    the rows.
    """

    def write(self, batch: Sequence[Rows]) -> None:
        """Take the rows of one flush."""

    def close(self, **meta: Any) -> None:
        """End; ``meta`` says how."""


@dataclass
class _Planned:
    """A plan whose steps are recorded, its stream, the leaf of each bin, and the last step."""

    plan: Plan
    stream: int
    leaf_of_bin_B: Tensor
    step: int = -1


class Recorder:
    """Gather rows on the device and hand them to sinks about once a second, from a thread of its own.

    It is itself a sink: ``GradientSplitter(model, sinks=[Recorder([RunWriter("run.db")])])``. A sink of its own that
    raises is dropped with one warning; the training goes on. After a fork the child records nothing.

    Args:
        sinks: what takes the rows.
        seconds: between flushes; 0: after every row, on the calling thread.
        max_nodes: how fine a StepRecord is summed up, see `Outline`.
        samples: the model, or a `SampleWatch`: the run file gets the samples that stood out at a departure.

    Attributes:
        tell: what says that a sink failed.
    """

    tell = staticmethod(tell)

    def __init__(
        self,
        sinks: Iterable[RowSink],
        *,
        seconds: float = 1.0,
        max_nodes: int = 1000,
        samples: torch.nn.Module | SampleWatch | None = None,
    ) -> None:
        if samples is not None and not isinstance(samples, (torch.nn.Module, SampleWatch)):
            raise ValueError(
                f"Recorder(samples={samples!r:.80}): expected the model whose samples are to be seen, or a SampleWatch "
                "of it. Write Recorder(…, samples=model)."
            )
        watch = SampleWatch(samples) if isinstance(samples, torch.nn.Module) else samples
        self.samples = None if watch is None else SampleReader(watch)
        self.sinks = list(sinks)
        self.seconds, self.max_nodes = seconds, max_nodes
        self._buffers: dict[int, RowBuffer] = {}
        self._full: list[Rows] = []
        self._lengths: list[tuple[int, int, Tensor]] = []
        self._turns: list[tuple[int, int, Tensor, Tensor]] = []
        self._fill = threading.Lock()  # guards the buffers; held by the training thread for one row at most
        self._flush = threading.Lock()  # guards the sinks
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid, self._closed = os.getpid(), False
        self._plans: list[_Planned] = []
        self._next_turns: dict[int, int] = {}
        self._num_rows: dict[int, int] = {}
        self._stood_out: list[dict[str, Any]] = []
        atexit.register(self.close)

    def open(self, stream: Stream, device: torch.device) -> None:
        """Make room for the rows of a stream."""
        with self._fill:
            self._buffers[stream.index] = RowBuffer(stream, device)

    def add(self, stream: int, step: int, squares_L: Tensor, **numbers: Any) -> None:
        """Add a row, see `RowBuffer.add`; does not wait for the device unless the buffer is full."""
        if self._closed or os.getpid() != self._pid:
            return
        with self._fill:
            buffer = self._buffers[stream]
            buffer.add(step, squares_L, **numbers)
            if self.samples is not None:
                row = self._num_rows[stream] = self._num_rows.get(stream, -1) + 1
                self.samples.watch.seal(stream, row)
            if buffer.full:
                self._full += self._taken(buffer)
        if self.seconds <= 0:
            self.flush()
        elif self._thread is None:
            self._thread = threading.Thread(target=self._tick, name="gradsplit-recorder", daemon=True)
            self._thread.start()

    def _taken(self, buffer: RowBuffer) -> list[Rows]:
        """The rows of a buffer, whose departures are looked at; waits for the device."""
        rows = buffer.take()
        if rows is None:
            return []
        if self.samples is not None:
            try:
                self._stood_out += self.samples.look(rows)
            except Exception as error:
                self.samples = None
                self.tell(f"samples are no longer looked at, the training goes on ({error!r}). Please report it.")
        return [rows]

    def __call__(self, record: StepRecord) -> None:
        """Record a step of a splitter or of GSO; each splitter, and each plan, is a stream of its own."""
        if self._closed or os.getpid() != self._pid:
            return
        plan, squares_B = record.plan, record.squares_B
        planned = self._planned(record)
        if planned is None:
            outline, index = Outline.of(plan, max_nodes=self.max_nodes), len(self._plans)
            about = {"plan": plan.describe(max_lines=0), "fingerprint": plan.fingerprint, "num_bins": plan.num_bins}
            about["names"] = list(plan.layout.names)
            name = "GSO" if isinstance(record, ShareRecord) else "the splitter"
            self.open(Stream(index, name, outline, True, about), squares_B.device)
            planned = _Planned(plan, index, torch.from_numpy(outline.leaf_of_bin_B).to(squares_B.device))
            self._plans.append(planned)
        planned.plan, planned.step = plan, record.step
        index, leaf_of_bin_B = planned.stream, planned.leaf_of_bin_B
        num_leaves = self._buffers[index].stream.outline.num_leaves
        if isinstance(record, ShareRecord) and record.step >= self._next_turns.get(index, 0):
            self._next_turns[index] = next_reading(record.step)
            self.add_turns(index, record.step, record.factor, record.by_tensor())
        self.add(index, record.step, **summed_up(record, leaf_of_bin_B, num_leaves))

    def _planned(self, record: StepRecord) -> _Planned | None:
        """The stream of a record, if it has one: that of its plan, or of an equal one whose steps it goes on with.

        Two networks of the same shapes have equal plans, each its own; their steps have the same numbers.
        """
        for one in self._plans:
            if one.plan is record.plan:
                return one
        equal = [one for one in self._plans if one.plan.fingerprint == record.plan.fingerprint]
        return next((one for one in equal if one.step < record.step), None)

    def add_lengths(self, stream: int, step: int, length_T: Tensor) -> None:
        """Add the lengths of all tensors before an update, in the order of the layout; copied at the next flush."""
        if self._closed or os.getpid() != self._pid:
            return
        with self._fill:
            self._lengths.append((stream, step, length_T))

    def add_turns(self, stream: int, step: int, factor: Tensor, values: Tensor) -> None:
        """Add what a step of GSO did to each tensor, see `ShareRecord.by_tensor`; copied at the next flush."""
        if self._closed or os.getpid() != self._pid:
            return
        with self._fill:
            self._turns.append((stream, step, factor, values))

    def _read_turns(self, turns: list[tuple[int, int, Tensor, Tensor]]) -> list[Turns]:
        """Copy to the host, one entry per stream."""
        made = []
        for stream in dict.fromkeys(one[0] for one in turns):
            mine = [(step, float(factor), values.cpu().numpy()) for at, step, factor, values in turns if at == stream]
            step_K, factor_K = np.array([m[0] for m in mine]), np.array([m[1] for m in mine])
            turned_KT, limit_KT, bounded_KT = np.stack([m[2] for m in mine], axis=1).astype(np.float32)
            made.append(Turns(self._buffers[stream].stream, step_K, factor_K, turned_KT, limit_KT, bounded_KT))
        return made

    def remark(self, values: Mapping[str, Any]) -> None:
        """Hand something that was seen beside the rows to the sinks that keep it."""
        if self._closed or os.getpid() != self._pid:
            return
        with self._flush:
            self._to_sinks(lambda sink: sink.remark(values) if hasattr(sink, "remark") else None)

    def note(self, action: GuardAction) -> None:
        """Hand what a guard did to the sinks that keep it, at once and behind the rows before it."""
        if self._closed or os.getpid() != self._pid:
            return
        self.flush()
        with self._flush:
            self._to_sinks(lambda sink: sink.note(action) if hasattr(sink, "note") else None)

    def flush(self) -> None:
        """Hand everything to the sinks now. Waits for the device."""
        if os.getpid() != self._pid:
            return
        with self._flush:
            with self._fill:
                batch, self._full = self._full, []
                batch += [rows for buffer in self._buffers.values() for rows in self._taken(buffer)]
                stood_out, self._stood_out = self._stood_out, []
                lengths, self._lengths = self._lengths, []
                turns, self._turns = self._turns, []
            if batch:
                self._to_sinks(lambda sink: sink.write(batch))
            if lengths:
                read = [(stream, step, length_T.cpu().numpy()) for stream, step, length_T in lengths]
                self._to_sinks(lambda sink: sink.add_lengths(read) if hasattr(sink, "add_lengths") else None)
            for values in stood_out:
                self._to_sinks(lambda sink, values=values: sink.remark(values) if hasattr(sink, "remark") else None)
            for one in self._read_turns(turns):
                self._to_sinks(lambda sink, one=one: sink.add_turns(one) if hasattr(sink, "add_turns") else None)

    def close(self, **meta: Any) -> None:
        """Flush and end every sink; later rows are ignored."""
        if self._closed or os.getpid() != self._pid:
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)
        self.flush()
        self._closed = True
        if self.samples is not None:
            self.samples.watch.close()
        with self._flush:
            self._to_sinks(lambda sink: sink.close(**meta))
        atexit.unregister(self.close)

    def _tick(self) -> None:
        while not self._stop.wait(self.seconds):
            try:
                self.flush()
            except Exception as error:
                self.tell(f"a flush of the recording failed ({error!r}).")

    def _to_sinks(self, act: Any) -> None:
        for sink in list(self.sinks):
            try:
                act(sink)
            except Exception as error:
                self.sinks.remove(sink)
                self.tell(f"{type(sink).__name__} failed and gets no more rows, the training goes on ({error!r}).")


def summed_up(record: StepRecord, leaf_of_bin_B: Tensor, num_leaves: int) -> dict[str, Tensor]:
    """Return a step's squares before and after and its outcomes, summed over the bins of each leaf."""
    decision, squares_B = record.decision, record.squares_B

    def sums(values_B: Tensor) -> Tensor:
        return torch.zeros(num_leaves, dtype=squares_B.dtype, device=squares_B.device).index_add(
            0, leaf_of_bin_B, values_B.to(squares_B.dtype)
        )

    return {
        "squares_L": sums(squares_B),
        "after_L": sums(record.norm_after_B().square()),
        "scaled_L": sums((decision.scale_B < 1) & decision.finite_B),
        "zeroed_L": sums(~decision.finite_B),
    }
