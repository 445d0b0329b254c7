"""Session: one process of the script, its optimizers, and the recording they share."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...hooks import after_backward, not_traced
from ...resume import DivergenceError, Guard
from ...resume.actions import GuardAction
from ..record import Recorder, RunFileError, RunWriter
from .launch import free_name
from .names import TensorsOf
from .patched import Losses, watch_own_bound
from .settings import Settings
from .track import Track, signature

__all__ = ["Guards", "Session"]


class Guards:
    """Guards of a script's optimizers.

    Weights, buffers and the optimizer go back, and its rates are lowered. The script's data cannot be skipped and its
    schedule cannot be set back from outside: both go on.

    Args:
        told: called with every action.
    """

    def __init__(self, told: Callable[[GuardAction], Any]) -> None:
        self._told = told
        # An optimizer keeps its guard alive, by its hooks, and nothing else does: scripts may make many.
        self._guards: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Guard]]
        self._guards = weakref.WeakKeyDictionary()
        self.num_actions = 0
        self._blind = False

    def begin(self, optimizer: torch.optim.Optimizer, splitter: Any) -> None:
        """Guard an optimizer from the step on that is about to be made."""
        earlier = self._of(optimizer)
        if earlier is not None:  # parameters were added: the snapshots do not fit any more
            earlier.remove()
        guard = Guard(TensorsOf(optimizer), optimizer, splitter, sinks=[self._note])
        self._guards[optimizer] = weakref.ref(guard)

    def _of(self, optimizer: torch.optim.Optimizer) -> Guard | None:
        known = self._guards.get(optimizer)
        return None if known is None else known()

    def factor(self, optimizer: torch.optim.Optimizer) -> float:
        """By which the optimizer's rates are multiplied while it steps."""
        guard = self._of(optimizer)
        return 1.0 if guard is None else guard.factor

    def after_step(self, optimizer: torch.optim.Optimizer, loss: Tensor | float) -> None:
        """Judge the step that was made.

        Raises:
            DivergenceError: no rollback is left.
        """
        guard = self._of(optimizer)
        if guard is None:
            return
        if not isinstance(loss, Tensor):
            if not self._blind:
                self._blind = True
                warnings.warn(
                    "gradsplit: no loss was seen, so that --guard has nothing to go by; it sees those that "
                    "loss.backward() is called on. Use gradsplit.Guard in the script.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        try:
            guard.step(loss)
        except DivergenceError:
            raise
        except Exception as error:
            guard.remove()
            del self._guards[optimizer]
            warnings.warn(
                f"gradsplit: guarding stopped, the training goes on ({error!r}). Please report it with the script.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _note(self, action: GuardAction) -> None:
        self.num_actions += 1
        self._told(action)


class Session:
    """Attach to every ``torch.optim.Optimizer`` of this process.

    Measuring never disturbs the script: what fails is reported once and given up. Bounding was asked for, so its errors
    are raised.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.losses = settings, Losses()
        self._tracks: weakref.WeakKeyDictionary[torch.optim.Optimizer, Track] = weakref.WeakKeyDictionary()
        self._recorder: Recorder | None = None
        self._place: Path | None = None
        self._num_streams, self._pid, self._broken = 0, os.getpid(), False
        self._guards: Guards | None = None
        self.num_rows = 0

    def install(self) -> None:
        """Register the hooks, for good."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        if os.getpid() == self.settings.pid:
            atexit.register(self.farewell)
        self.losses.install()
        watch_own_bound(self.before_own_bound, self.after_own_bound)
        register_optimizer_step_pre_hook(not_traced(self.pre))
        if self.settings.control or self.settings.guard:
            register_optimizer_step_post_hook(not_traced(self.post))

    def pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the gradients of a step when they are complete."""
        if _inside_another_step(optimizer):
            return None
        self._begin(optimizer)
        return after_backward(lambda: self._process(optimizer), args, kwargs)

    def post(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bound the update, and judge the step, where asked for."""
        track = self._tracks.get(optimizer)
        if track is not None and not _inside_another_step(optimizer):
            track.after_update()
            if self._guards is not None:
                self._guards.after_step(optimizer, track.last_loss)

    def before_own_bound(self, parameters: list[Tensor]) -> None:
        """Read gradients before the script scales them all; under control they are bounded first."""
        keys = {id(parameter) for parameter in parameters}
        for track in list(self._tracks.values()):
            if track.covers(keys):
                self._guarded(track.read)

    def after_own_bound(self, parameters: list[Tensor], factor: Tensor) -> None:
        """Note what the script did."""
        keys = {id(parameter) for parameter in parameters}
        self._early = (keys, factor)
        for track in list(self._tracks.values()):
            if track.covers(keys):
                self._guarded(lambda track=track: track.note_own_scale(factor))

    _early: tuple[set[int], Tensor] | None = None  # the script's first call comes before its optimizer is known

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        if os.getpid() != self._pid:  # a forked child that trains: it records on its own
            self._pid, self._recorder, self._num_streams, self._guards = os.getpid(), None, 0, None
            self._tracks = weakref.WeakKeyDictionary()
        track = self._tracks.get(optimizer)
        if track is None or track.signature != signature(optimizer):
            self._guarded(lambda: self._start(optimizer))
            track = self._tracks.get(optimizer)
        if track is not None:
            track.begin_step()

    def _process(self, optimizer: torch.optim.Optimizer) -> None:
        track = self._tracks.get(optimizer)
        if track is not None:
            self._guarded(lambda: self._commit(track, optimizer))

    @torch.no_grad()
    def _commit(self, track: Track, optimizer: torch.optim.Optimizer) -> None:
        track.commit(optimizer, self.losses.take(), 1.0 if self._guards is None else self._guards.factor(optimizer))
        self.num_rows += 1

    def _start(self, optimizer: torch.optim.Optimizer) -> None:
        if self._broken or not any(p.numel() for e in optimizer.param_groups for p in e["params"]):
            return
        if self._recorder is None:
            self._recorder = self._record()
        track = Track(optimizer, self._num_streams, self.settings, self._recorder)
        self._num_streams += 1
        self._tracks[optimizer] = track
        if self.settings.guard:
            self._guards = self._guards or Guards(self._recorder.note)
            self._guards.begin(optimizer, track.splitter)
        if self._early is not None and track.covers(self._early[0]):
            track.note_own_scale(self._early[1])

    def _record(self) -> Recorder:
        """Open the run file of this process, and the other sinks in rank 0."""
        from ..loggers import sink_from_words

        rank, world = _rank_and_world()
        base = Path(self.settings.record)
        name = base if rank == 0 else base.with_stem(f"{base.stem}.rank{rank}")
        self._place = free_name(name)
        about = {**self.settings.about, "torch": torch.__version__, "rank": rank, "world_size": world}
        about |= {"mode": "control" if self.settings.control else "watch", "command": _command(self.settings)}
        about |= {"guarded": True} if self.settings.guard else {}
        sinks: list[Any] = []
        try:
            sinks.append(RunWriter(self._place, about, max_megabytes=self.settings.max_megabytes))
        except RunFileError as error:
            warnings.warn(
                f"gradsplit: nothing is recorded, the training goes on ({error})", RuntimeWarning, stacklevel=1
            )
        if rank == 0:
            sinks += [sink_from_words(word) for word in self.settings.to]
        return _ScriptRecorder(sinks, seconds=self.settings.seconds)

    def _guarded(self, act: Any) -> None:
        """Run something of ours; in watch mode its failure must not be the script's."""
        if self._broken:
            return
        if self.settings.control:
            act()
            return
        try:
            act()
        except Exception as error:
            self._broken = True
            warnings.warn(
                f"gradsplit: watching stopped, the training goes on ({error!r}). Please report it with the script.",
                RuntimeWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """End the recording, if one was begun."""
        if self._recorder is not None:
            self._recorder.close()

    def farewell(self) -> None:
        """Say on stderr where the recording is, in the process that the user started."""
        if self.settings.quiet or os.getpid() != self.settings.pid:
            return
        place = self._place or Path(self.settings.record)  # a launcher trains nothing itself
        if not place.exists():
            print("gradsplit: no step of a torch.optim.Optimizer was seen; nothing was recorded", file=sys.stderr)
            return
        if self._guards is not None and self._guards.num_actions:
            print(f"gradsplit: the guard acted {self._guards.num_actions} times; the report says why", file=sys.stderr)
        shown = os.path.relpath(place)
        print(f"gradsplit: recorded; next: gradsplit report {place if '..' in shown else shown}", file=sys.stderr)


class _ScriptRecorder(Recorder):
    """A recorder that ends with the script and notes how it ended."""

    def close(self, **meta: Any) -> None:
        """See `Recorder.close`."""
        if self._closed or os.getpid() != self._pid:
            return
        kind = getattr(sys, "last_type", None)  # set by Python when it printed an uncaught exception
        if kind is not None:
            meta["exception"] = f"{kind.__name__}: {str(getattr(sys, 'last_value', ''))[:500]}"
        super().close(**meta)


def _inside_another_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step hooked by torch is under way around this one (Lookahead and the like): only the outermost acts.

    This is read from the call stack, because a counter would stay wrong after a step that raised.
    """
    frame: Any = sys._getframe(1)
    found = 0
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and "profile_name" in frame.f_code.co_varnames:
            found += 1
            if found > 1:
                return True
        frame = frame.f_back
    return False


def _rank_and_world() -> tuple[int, int]:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0") or 0), int(os.environ.get("WORLD_SIZE", "1") or 1)


def _command(settings: Settings) -> list[str]:
    """What was run, to build the next command line from."""
    return list(settings.about.get("argv", []))
