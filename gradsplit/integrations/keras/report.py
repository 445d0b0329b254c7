"""Which bins exploded: what a step leaves on the device, and the callback that reads it for logs and TensorBoard."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch
from keras import ops

from ...budget import Decision
from ...plan import Plan
from ...split import StepRecord
from .state import Kept

__all__ = ["Report", "SplitCallback"]


class Report:
    """The last decision of an optimizer, and counts of outcomes since it was built.

    Args:
        optimizer: owns the variables.
        plan: B bins.
    """

    def __init__(self, optimizer: Any, plan: Plan) -> None:
        self.plan = plan
        last = np.repeat(np.array([[0.0], [1.0], [np.inf]], dtype=np.float32), plan.num_bins, axis=1)
        self._kept = Kept(optimizer, "report", (last, np.zeros((2, plan.num_bins), dtype=np.float32)))

    def write(self, decision: Decision) -> None:
        """Leave a decision behind; nothing waits for the device."""
        _, counts = self._kept.read()
        scaled = ops.logical_and(decision.finite_B, decision.scale_B < 1)
        norm_B = ops.where(decision.finite_B, decision.norm_B, float("inf"))
        rows = [ops.cast(row, "float32") for row in (norm_B, decision.scale_B, decision.limit_B)]
        outcomes = [ops.cast(row, "float32") for row in (scaled, ops.logical_not(decision.finite_B))]
        self._kept.write((ops.stack(rows), counts + ops.stack(outcomes)))

    def counts(self) -> np.ndarray:
        """Copy to the host (2, B): how often each bin was scaled, and how often it was zeroed, since the beginning."""
        return np.array(ops.convert_to_numpy(self._kept.variables[1]))

    def record(self, step: int) -> StepRecord:
        """Copy the last decision to the host."""
        last = torch.from_numpy(np.array(ops.convert_to_numpy(self._kept.variables[0]), dtype=np.float64))
        norm, scale_B, limit_B = last
        finite_B = norm.isfinite()
        decision = Decision(
            self.plan, norm.where(finite_B, torch.zeros_like(norm)), finite_B, scale_B, (("bin", None, limit_B),)
        )
        return StepRecord(step, norm.square(), decision)


class SplitCallback(keras.callbacks.Callback):
    """Log what the splitting optimizer of a model does; it reads the optimizer's state, the step never waits.

    Into the ``logs`` of every epoch go ``gradsplit_norm`` (of the whole gradient, last step), ``gradsplit_kept`` (norm
    after / before), ``gradsplit_scaled`` and ``gradsplit_zeroed`` (outcomes since the epoch before, bins x steps), so
    put it before CSVLogger and its kin. On TensorBoard the same stand as scalars under ``gradsplit/``, and the worst
    bins with their norms before and after as text.

    Args:
        place: a folder for TensorBoard's event files, or a ``SummaryWriter`` of yours; None: logs only.
        every: "epoch", or a number of batches after which TensorBoard is written too.
        worst: bins that are named.
        verbose: 1 prints the worst bins at the end of each epoch.

    Raises:
        ValueError: another ``every``; from training, an optimizer that does not split.
        ImportError: the package tensorboard is missing.
    """

    def __init__(self, place: Any = None, *, every: str | int = "epoch", worst: int = 5, verbose: int = 0) -> None:
        super().__init__()
        if every != "epoch" and not (isinstance(every, int) and every >= 1):
            raise ValueError(f"SplitCallback(every={every!r}): expected 'epoch' or a number of batches >= 1.")
        self._every, self._worst, self._verbose = every, worst, verbose
        self._batches = 0
        self._owns = place is not None and not hasattr(place, "add_scalar")
        if self._owns:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"SplitCallback({place!r}): expected the package tensorboard. Run: pip install tensorboard"
                ) from error
            place = SummaryWriter(str(place))
        self._writer = place

    def on_train_begin(self, logs: Any = None) -> None:
        """Look for the splitting optimizer."""
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not hasattr(optimizer, "split_report"):
            raise ValueError(
                f"SplitCallback: expected a model compiled with split(…) or GSO, got {type(optimizer).__name__}. "
                "Compile with optimizer=split(optimizer)."
            )
        self._optimizer, self._batches = optimizer, 0
        self._before: Any = 0.0 if optimizer.split_report is None else self._report().counts()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write to TensorBoard every so many batches."""
        self._batches += 1
        if self._every != "epoch" and self._batches % int(self._every) == 0 and self._writer is not None:
            self._write(self._scalars(self._report().counts() - self._before))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Enter the epoch into the logs and TensorBoard."""
        counts = self._report().counts()
        values = self._scalars(counts - self._before)
        self._before = counts
        if logs is not None:
            logs.update({f"gradsplit_{name}": value for name, value in values.items()})
        if self._writer is not None:
            self._write(values)
        if self._verbose:
            print(f"\n{self._record()}")

    def on_train_end(self, logs: Any = None) -> None:
        """Close the event file, if it is ours."""
        if self._owns:
            self._writer.close()

    def worst(self) -> list[Any]:
        """Return the bins that the last step touched hardest, see `gradsplit.StepRecord.worst`."""
        return self._record().worst(self._worst)

    def _report(self) -> Report:
        # The JAX trainer keeps its state apart while it trains.
        getattr(self.model, "jax_state_sync", lambda: None)()
        report: Report = self._optimizer.split_report
        return report

    def _record(self) -> Any:
        return self._report().record(int(np.asarray(keras.ops.convert_to_numpy(self._optimizer.iterations))))

    def _scalars(self, outcomes: np.ndarray) -> dict[str, float]:
        record = self._record()
        total, after = float(record.total_norm()), float(record.norm_after_B().square().sum().sqrt())
        scaled, zeroed = outcomes.sum(axis=1)
        return {
            "norm": total,
            "kept": after / total if total else 1.0,
            "scaled": float(scaled),
            "zeroed": float(zeroed),
        }

    def _write(self, values: dict[str, float]) -> None:
        record = self._record()
        for name, value in values.items():
            self._writer.add_scalar(f"gradsplit/{name}", value, record.step)
        lines = [f"{r.name}: {r.norm:.3g} -> {r.norm_after:.3g}, {r.outcome.name}" for r in self.worst()]
        self._writer.add_text("gradsplit/worst", "  \n".join(lines), record.step)
        self._writer.flush()
