"""Guard: snapshots of a run, and the way back to them when it diverges."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..split import StepRecord
from .actions import GuardAction
from .batches import Batches, Loaders
from .divergence import Agreement, Divergence, LossHistory, PendingLosses, first_few, nonfinite_names
from .snapshots import DiskSnapshots, LoweredRate, MemorySnapshots, Snapshot, restore

__all__ = ["DivergenceError", "Guard"]

_LOG = logging.getLogger("gradsplit")


class DivergenceError(RuntimeError):
    """Training diverged and no rollback is left; the weights are those of the last snapshot.

    Attributes:
        actions: everything that the guard did, oldest first; the last one is this stop.
    """

    def __init__(self, message: str, actions: Sequence[GuardAction] = ()) -> None:
        super().__init__(message)
        self.actions = tuple(actions)


def check_counts(**least: tuple[int, int]) -> None:
    """Check whole numbers against the least that each may be.

    Raises:
        ValueError: one is below it, or is not a whole number.
    """
    for name, (value, bound) in least.items():
        if not isinstance(value, int) or value < bound:
            raise ValueError(
                f"Guard({name}={value!r}): expected a whole number >= {bound}. Leave {name} out for its default."
            )


def check_constants(score: float, lr_factor: float) -> None:
    """Check the numbers that need not be whole.

    Raises:
        ValueError: one is out of its range.
    """
    if not score > 0:
        raise ValueError(f"Guard(score={score!r}): expected a number above 0, for example 10.")
    if not 0 < lr_factor <= 1:
        raise ValueError(f"Guard(lr_factor={lr_factor!r}): expected a factor in (0, 1]; 1 leaves the rate alone.")


def check_parts(parts: Mapping[str, Any]) -> None:
    """Check that every part has a state.

    Raises:
        ValueError: a part has no state, or has the guard's own name.
    """
    for name, part in parts.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")) or name == "guard":
            raise ValueError(
                f"Guard({name}={type(part).__name__}): expected an object with state_dict() and load_state_dict(), "
                "under a name other than 'guard'."
            )


def worst_of(record: StepRecord | None, model: Any, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Name what was hit worst: the splitter's bins with their norms, else the tensors that are not finite."""
    if record is not None:
        return tuple(f"{one.name} norm {one.norm:.3g} -> {one.norm_after:.3g}" for one in record.worst(3))
    return tuple(f"{name} not finite" for name in nonfinite_names(model, optimizer)[:3])


def stop_message(actions: Sequence[GuardAction], allowed: int) -> str:
    """Say why the guard stops, what it tried, and what to do; the last action is the stop."""
    *earlier, stop = actions
    tried = "".join(f" {action}" for action in earlier)
    return (
        f"Guard.step(loss={stop.loss:g}): training diverged at step {stop.step} and none of {allowed} rollbacks is "
        f"left, {stop.reason}. Worst: {', '.join(stop.worst) or 'unknown'}.{tried} The weights are those of step "
        f"{stop.to_step}. Look at the tensors and batches named here, then bound the gradient with GradientSplitter, "
        "lower the learning rate, or raise max_rollbacks."
    )


class Guard:
    """Undo the updates of a run that has diverged, leave out the batches behind them, lower the rate, and go on.

    Call `step` last in every iteration. A step is *bad* in three cases:

    - its loss is not finite;
    - its loss is out of its history: more than ``score`` x max(1.4826 MAD, 0.05 |median|, 0.02 x the loss at the start)
      above the median of the last ``history`` losses that were not out;
    - more than half of the splitter's bins were ZEROED.

    The run has *diverged* if ``patience`` consecutive steps were bad. It has diverged at once if a loss is not finite
    and a weight, a buffer or an optimizer state is not finite either.

    Then weights, buffers, optimizer, scheduler and splitter go back to the newest snapshot. They go back to the one
    before if the newest has led to a divergence already. Every learning rate is multiplied by ``lr_factor``. The data
    go on: the batches that were drawn since the snapshot are not drawn again. While steps are bad, the guard takes no
    snapshot. It never keeps a snapshot that is not finite.

    Args:
        model: its parameters and all buffers are guarded; an action's reason names what could not be set back.
        optimizer: a ``torch.optim.Optimizer``.
        splitter: a GradientSplitter, or anything with ``state_dict()``.
        scheduler: a learning-rate scheduler; it is set back, and never meets the lowered rates.
        others: more objects with ``state_dict()``, by name: a GradScaler, a moving average.
        every: steps between snapshots.
        keep: snapshots; each takes the memory, or the disk space, of one checkpoint.
        folder: keep the snapshots in this folder, as checkpoints that a thread writes, and one copy in memory.
        score, patience, history: see above; no unit, steps, losses.
        lr_factor: in (0, 1]; each rollback multiplies every learning rate by it, for good.
        max_rollbacks: after so many rollbacks the next divergence is raised.
        skip: further batches to leave out after a rollback; needs `batches`.
        check_every: steps between two readings of the losses; a reading waits for the GPU.
        process_group: the ranks that train one model; None: all. Each reading takes one small all-reduce, so that all
            ranks decide alike.
        sinks: functions that are called with every `GuardAction`; a recorder of the splitter is always called.

    Raises:
        ValueError: a number out of its range, or a part without a state.

    Source: going back and leaving batches out is what PaLM did by hand (Chowdhery et al. 2022, section 5.1: about 100
    steps back, 200 to 500 batches). Deviations: only the batches since the snapshot and ``skip`` more are left out, and
    the rate is lowered as well. The random generators are not set back, because a loop that draws its batches from them
    would draw the same batches again.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> guard = Guard(model, sgd)
    >>> before = model.weight.item()
    >>> for scale in guard.batches([1.0, float("nan"), 1.0]):
    ...     sgd.zero_grad()
    ...     loss = scale * model(torch.ones(1, 1)).sum()
    ...     loss.backward()
    ...     sgd.step()
    ...     if guard.step(loss):
    ...         print(guard.actions[-1].batches, model.weight.item() == before)
    epoch 0: 0 to 1 True
    >>> guard.factor, round(before - model.weight.item(), 3)
    (0.5, 0.05)
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        splitter: Any = None,
        scheduler: Any = None,
        *,
        others: Mapping[str, Any] | None = None,
        every: int = 100,
        keep: int = 2,
        folder: str | Path | None = None,
        score: float = 10.0,
        patience: int = 10,
        history: int = 128,
        lr_factor: float = 0.5,
        max_rollbacks: int = 3,
        skip: int = 0,
        check_every: int = 1,
        process_group: Any = None,
        sinks: Iterable[Callable[[GuardAction], Any]] = (),
    ) -> None:
        check_counts(
            every=(every, 1),
            keep=(keep, 1),
            patience=(patience, 1),
            history=(history, 16),
            max_rollbacks=(max_rollbacks, 0),
            skip=(skip, 0),
            check_every=(check_every, 1),
        )
        check_constants(score, lr_factor)
        given: Any = optimizer
        if not hasattr(given, "register_step_pre_hook"):
            raise TypeError(
                f"Guard(optimizer={type(given).__name__}): expected a torch optimizer. Write Guard(model, optimizer)."
            )
        if not hasattr(model, "state_dict"):
            raise TypeError(f"Guard(model={type(model).__name__}): expected a module. Write Guard(model, optimizer).")
        named = {"model": model, "optimizer": optimizer, "splitter": splitter, "scheduler": scheduler}
        self._states = {name: part for name, part in named.items() if part is not None} | dict(others or {})
        check_parts(self._states)
        self.model, self.optimizer, self.splitter = model, optimizer, splitter
        self.every, self.check_every, self.skip = every, check_every, skip
        self.lr_factor, self.max_rollbacks = lr_factor, max_rollbacks
        self.snapshots = MemorySnapshots(keep) if folder is None else DiskSnapshots(Path(folder), keep)
        self.step_count, self.num_updates, self.num_rollbacks = 0, 0, 0
        self.actions: list[GuardAction] = []
        self._rate = LoweredRate(optimizer, self._first_snapshot)
        self._agreement = Agreement(process_group)
        self.history = LossHistory(history, score)
        self._divergence = Divergence(model, optimizer, self.history, patience, self._agreement)
        self._loaders = Loaders(self._first_snapshot)
        self._pending = PendingLosses(self._agreement)
        self._since = 0
        self._used: Snapshot | None = None
        self._record: StepRecord | None = None
        self.sinks = list(sinks)
        if hasattr(splitter, "sinks"):
            self.sinks += [sink.note for sink in splitter.sinks if hasattr(sink, "note")]
            splitter.sinks.append(self._remember)

    @property
    def factor(self) -> float:
        """By which every learning rate is multiplied while the optimizer steps."""
        return self._rate.factor

    @property
    def parts(self) -> dict[str, Any]:
        """All that belongs into a checkpoint, by name: ``gs.save_checkpoint(path, **guard.parts)``."""
        return {**self._states, "guard": self}

    def batches(self, loader: Iterable[Any]) -> Batches:
        """Hand out a loader's batches, know the position, and leave out what is to be skipped; see `Batches`.

        The same loader gives the same object again, so that the call may stand in the loop over epochs.
        """
        return self._loaders.batches_of(loader)

    @torch.no_grad()
    def step(self, loss: Tensor | float) -> GuardAction | None:
        """Judge the iteration that ends here; roll back if the run has diverged, take a snapshot if one is due.

        Args:
            loss: what backward was called on, a number or a scalar tensor; under accumulation the mean or the last.

        Returns:
            What was done, or None.

        Raises:
            DivergenceError: the run has diverged and no rollback, or no snapshot, is left.
            ValueError: a loss that is not one real number; nothing has happened then.
        """
        self._pending.add(loss, self._record, copy=self.check_every > 1)
        self.step_count += 1
        self.num_updates += 1
        if len(self._pending) < self.check_every:
            return None
        judged = self._pending.take()
        first = self.step_count - len(judged)
        for i, (number, zeroed) in enumerate(judged):
            reason = self._divergence.reason(number, zeroed)
            if reason:
                return self._roll_back(first + i, number, reason)
        if self._divergence.bad == 0 and self.step_count - self._since >= self.every:
            self._take_snapshot()
        return None

    def _remember(self, record: StepRecord) -> None:
        self._record = record

    def _first_snapshot(self) -> None:
        """Take the first snapshot right before the first update: until then the script may change the model."""
        if self.snapshots.newest is None and not any(nn.parameter.is_lazy(p) for _, p in self.model.named_parameters()):
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        lost = bool(nonfinite_names(self.model, self.optimizer))
        if self._agreement.any(lost, self.optimizer):
            return  # the loss will show it
        parts = self.parts if isinstance(self.snapshots, DiskSnapshots) else self._states
        self._since = self.step_count
        self.snapshots.take(Snapshot(self.step_count, self.num_updates, self._loaders.places), parts)

    def remove(self) -> None:
        """Detach from the optimizer and the splitter; the rates are no longer lowered."""
        self._rate.remove()
        if self._remember in getattr(self.splitter, "sinks", ()):
            self.splitter.sinks.remove(self._remember)

    def roll_back(self, reason: str = "asked for") -> GuardAction:
        """Do what a divergence does, now.

        Raises:
            DivergenceError: no rollback, or no snapshot, is left.
        """
        return self._roll_back(self.step_count - 1, math.nan, reason)

    def _roll_back(self, step: int, loss: float, reason: str) -> GuardAction:
        stops = self.num_rollbacks >= self.max_rollbacks
        self.snapshots.wait()  # one that cannot be written is no way back
        if self._used is not None and self._used is self.snapshots.newest and len(self.snapshots) > 1:
            self.snapshots.discard_newest()
        snapshot = self.snapshots.newest
        if snapshot is None:
            raise DivergenceError(
                f"Guard.step(loss={loss:g}): training diverged before there was a finite snapshot, {reason}. Look at "
                "the initial weights and the first batches.",
                self.actions,
            )
        worst = worst_of(self._record, self.model, self.optimizer)
        left_out = self._loaders.since(snapshot.places, 0 if stops else self.skip)
        undone = self.num_updates - snapshot.num_updates
        lost = restore(self.snapshots.tree(snapshot), self._states)
        if lost:
            reason += f"; not set back, since the snapshot has no such buffers: {first_few(lost)}"
        self.num_updates, self._since, self._used = snapshot.num_updates, self.step_count, snapshot
        self._divergence.bad = 0
        if not stops:
            self.num_rollbacks += 1
            self._rate.factor *= self.lr_factor
            self._loaders.skip(self.skip)
        action = GuardAction(
            kind="stopped" if stops else "rolled_back",
            step=step,
            to_step=snapshot.step,
            time=time.time(),
            reason=reason,
            loss=loss,
            usual=self.history.median,
            factor=self.factor,
            num=self.num_rollbacks,
            num_undone=undone,
            optimizer=type(self.optimizer).__name__,
            batches=left_out,
            worst=worst,
        )
        self.actions.append(action)
        _LOG.warning("gradsplit guard: %s", action)
        for sink in self.sinks:
            sink(action)
        if stops:
            raise DivergenceError(stop_message(self.actions, self.max_rollbacks), self.actions)
        return action

    def state_dict(self) -> dict[str, Any]:
        """Return the guard's own state and the data positions; model, optimizer and others have their own."""
        return {
            "step_count": self.step_count,
            "num_updates": self.num_updates,
            "num_rollbacks": self.num_rollbacks,
            "bad": self._divergence.bad,
            "since": self._since,
            "factor": self.factor,
            "history": self.history.state_dict(),
            "looks": self._pending.state_dict(),  # the key that checkpoints have had from the first version on
            "actions": [action.to_dict() for action in self.actions],
            "batches": self._loaders.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off; the next snapshot is taken at once, because the earlier ones are gone.

        Raises:
            ValueError: the state of something else.
        """
        missing = set(self.state_dict()) - set(state if isinstance(state, Mapping) else ())
        if missing:
            what = "a mapping" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"Guard.load_state_dict(…): expected what state_dict() returned, got {what} without "
                f"{sorted(missing)}. Load the part that was saved from a Guard."
            )
        self._loaders.load_state_dict(state["batches"])
        self.step_count, self.num_updates = int(state["step_count"]), int(state["num_updates"])
        self.num_rollbacks, self._divergence.bad = int(state["num_rollbacks"]), int(state["bad"])
        self._since, self._rate.factor = int(state["since"]), float(state["factor"])
        self.history.load_state_dict(state["history"])
        self._pending.load_state_dict(state["looks"])
        self.actions = [GuardAction.from_dict(action) for action in state["actions"]]
        self.snapshots.clear()
        self._used = None
