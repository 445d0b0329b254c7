"""Session: one process of the script, its optimizers, and the recording they share."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...hooks import after_backward, not_traced
from ...resume import DivergenceError, Guard
from ...resume.actions import GuardAction
from ...sources.observe import SampleWatch
from ..record import Recorder, RunFileError, RunWriter
from .by_hand import HandUpdates
from .ending import say
from .given import UNLIKE, Given, Sizes, largest_given
from .launch import free_name
from .names import TensorsOf, names_of_leaves, roots_of
from .patched import (
    Losses,
    leaves_in_order,
    lost_in_forward,
    own_factor,
    watch_own_bound,
    watch_scaler,
)
from .settings import Settings
from .track import Track, signature

__all__ = ["Guards", "Session"]

_LOOKS = 8  # backward passes from which the order of the forward pass is read
_REMARKS = 20  # most forward passes with a lost value that are looked into
_UNSEEN = 8  # backward passes without a step, and four times those of a usual step, before the user is told
_TRIES = 20  # names for the run file, where processes of one script begin at once


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
        self._guards: MutableMapping[torch.optim.Optimizer, weakref.ref[Guard]] = WeakIdKeyDictionary()
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
                say(
                    "no loss was seen, so that --guard has nothing to go by; it sees those that loss.backward() is "
                    "called on. Use gradsplit.Guard in the script."
                )
            return
        try:
            guard.step(loss)
        except DivergenceError:
            raise
        except Exception as error:
            guard.remove()
            del self._guards[optimizer]
            say(f"guarding stopped, the training goes on ({error!r}). Please report it with the script.")

    def _note(self, action: GuardAction) -> None:
        self.num_actions += 1
        self._told(action)


class Session:
    """Attach to every ``torch.optim.Optimizer`` of this process.

    Measuring never disturbs the script: what fails is reported once and given up. Bounding was asked for, so its errors
    are raised.

    Args:
        settings: what was asked for.
        closes: whether the recording ends by itself with the process; otherwise whoever made the session ends it.
    """

    def __init__(self, settings: Settings, *, closes: bool = True) -> None:
        self.settings, self.losses, self._closes = settings, Losses(), closes
        # By identity: an optimizer may define what equals it.
        self._tracks: MutableMapping[torch.optim.Optimizer, Track] = WeakIdKeyDictionary()
        self._recorder: Recorder | None = None
        self._place: Path | None = None
        self._num_streams, self._pid, self._broken = 0, os.getpid(), False
        self._guards: Guards | None = None
        self.num_rows, self.failed = 0, ""
        self._writer: RunWriter | None = None
        self._num_passes, self._passes_then = 0, 0
        self._order: dict[int, int] = {}  # id(parameter) -> place in the forward pass
        self._alive: list[Tensor] = []  # so that no id is given twice while the order is gathered
        self._looks = 0
        self._lost: dict[str, Any] | None = None
        self._num_remarks = 0
        self._sizes, self.given = Sizes(), Given()
        self._by_hand = HandUpdates(self)
        self._samples = SampleWatch() if settings.samples else None

    def install(self) -> None:
        """Register the hooks, for good."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self.losses.install()
        self.losses.before += [lambda loss, value: self._guarded(lambda: self._before_backward(loss, value))]
        self.losses.after += [lambda: self._guarded(lambda: self._by_hand.after_backward())]
        watch_own_bound(self.before_own_bound, self.after_own_bound)
        watch_scaler(self.before_scaler, self.after_scaler)
        if self._samples is not None:
            self._samples.open()  # before the first model runs
        register_optimizer_step_pre_hook(not_traced(self.pre))
        if self.settings.control or self.settings.guard:
            register_optimizer_step_post_hook(not_traced(self.post))

    @property
    def place(self) -> Path | None:
        """The run file of this process; None before the first step."""
        return self._place

    @property
    def nothing(self) -> bool:
        """Whether a recording was begun and has no row."""
        written = self.num_rows if self._writer is None or not self._writer.failed else self._writer.num_rows
        return bool(self.failed or (self._writer is not None and self._writer.failed)) and not written

    def missing(self) -> str:
        """Say what the run file lacks; empty where it has every step."""
        if self._writer is not None and self._writer.failed:
            return f"{self._writer.num_rows} of {self.num_rows} steps were written"  # it has said why
        if self.failed and self.num_rows:
            return f"the recording ends with step {self._last_step()}"
        behind = self._num_passes - self._passes_then
        if self.num_rows and behind >= _UNSEEN and behind > 4 * self._passes_then / self.num_rows:
            return f"the last {behind} backward passes are not in it: no step of an optimizer was seen after them"
        return ""

    @property
    def num_actions(self) -> int:
        """What the guards did."""
        return 0 if self._guards is None else self._guards.num_actions

    def _before_backward(self, loss: Tensor, value: Tensor | None) -> None:
        self._leave_parent()
        self._num_passes += 1
        if self._looks < _LOOKS:
            self._looks += 1
            self._watchfully(lambda: self._learn_order(loss))
        self._guarded(lambda: self._by_hand.before_backward(loss))  # it records the pass before; then comes this one
        self._watchfully(lambda: self.given.look(loss))
        if value is not None and value.device.type == "cpu":  # elsewhere a look at the number would wait
            self._watchfully(lambda: self._look(loss, float(value.real)))

    def _look(self, loss: Tensor, value: float) -> None:
        """Look at the forward pass of a loss that was lost, and at the batch of one that jumped."""
        if not math.isfinite(value):
            self._examine(loss)
            return
        unlike = self._sizes.look(value, lambda: largest_given(loss))
        if unlike > UNLIKE and self._lost is None and self._num_remarks < _REMARKS:
            self._lost = {"kind": "batch", "where": "", "times": unlike}

    def _learn_order(self, loss: Tensor) -> None:
        for leaf in leaves_in_order(loss):
            if id(leaf) not in self._order:
                self._order[id(leaf)] = len(self._order)
                self._alive.append(leaf)

    def _examine(self, loss: Tensor) -> None:
        """Look where the forward pass of this loss was lost; the step that uses it says so."""
        if self._lost is None and self._num_remarks < _REMARKS:
            names: dict[int, str] = {}
            for track in list(self._tracks.values()):
                names |= {id(p): name for p, name in zip(track.parameters, track.names, strict=True)}
            if not names:  # the first step: its optimizer is not known yet
                names = names_of_leaves(leaves_in_order(loss))
            self._lost = lost_in_forward(loss, names)

    def _watchfully(self, act: Callable[[], Any]) -> None:
        """Do what only adds to the evidence: where it fails, the evidence is smaller, and nothing else happens."""
        with contextlib.suppress(Exception), torch.no_grad():
            act()

    def before_scaler(self, optimizer: Any) -> int:
        """Return how many steps an optimizer has made before a gradient scaler decides on the next."""
        track = self._track_of(optimizer)
        return -1 if track is None else track.step

    def after_scaler(self, optimizer: Any, mark: int) -> None:
        """Record the step that a gradient scaler did not make, under the script's own number and with its own loss."""
        self._guarded(lambda: self._after_scaler(getattr(optimizer, "optimizer", optimizer), mark))

    def _after_scaler(self, optimizer: Any, mark: int) -> None:
        track = self._track_of(optimizer)
        if (-1 if track is None else track.step) != mark or not isinstance(optimizer, torch.optim.Optimizer):
            return
        self._begin(optimizer)
        track = self._track_of(optimizer)
        if track is not None:
            self._commit(track, optimizer, not_made=True)

    def _track_of(self, optimizer: Any) -> Track | None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return self._tracks.get(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None

    def pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the gradients of a step when they are complete."""
        if _inside_another_step(optimizer):
            return None
        self._guarded(lambda: self._begin(optimizer))
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

    def after_own_bound(self, parameters: list[Tensor], max_norm: float, norm: Tensor) -> None:
        """Note what the script did."""
        self._guarded(lambda: self._note_own_bound({id(parameter) for parameter in parameters}, max_norm, norm))

    def _note_own_bound(self, keys: set[int], max_norm: float, norm: Tensor) -> None:
        self._early = (keys, own_factor(max_norm, norm))
        for track in list(self._tracks.values()):
            if track.covers(keys):
                track.note_own_scale(self._early[1])

    _early: tuple[set[int], Tensor] | None = None  # the script's first call comes before its optimizer is known

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        self._leave_parent()
        self._by_hand.stop()
        track = self._tracks.get(optimizer)
        if track is None or track.signature != signature(optimizer):
            self._guarded(lambda: self._start(optimizer))
            track = self._tracks.get(optimizer)
        if track is not None:
            track.begin_step()

    def _leave_parent(self) -> None:
        """A forked child that trains records on its own."""
        if os.getpid() != self._pid:
            self._pid, self._recorder, self._num_streams, self._guards = os.getpid(), None, 0, None
            self._writer, self.num_rows, self.failed = None, 0, ""
            self._tracks = WeakIdKeyDictionary()
            self._by_hand = HandUpdates(self)
            if self._samples is not None:
                self._samples.forget()

    def _process(self, optimizer: torch.optim.Optimizer) -> None:
        track = self._tracks.get(optimizer)
        if track is not None:
            self._guarded(lambda: self._commit(track, optimizer))

    @torch.no_grad()
    def _commit(self, track: Track, optimizer: torch.optim.Optimizer, *, not_made: bool = False) -> None:
        factor = 1.0 if self._guards is None else self._guards.factor(optimizer)
        track.commit(optimizer, self.losses.take(), factor, given=self.given.take(), not_made=not_made)
        self._count(track)

    def _count(self, track: Track) -> None:
        self.num_rows += 1
        self._passes_then = self._num_passes
        if self._lost is not None and self._recorder is not None:
            lost, self._lost = self._lost, None
            self._num_remarks += 1
            self._recorder.remark({**lost, "step": track.step, "row": track.num_rows - 1, "stream": track.index})

    def hand_row(self, track: Track, squares_L: Tensor, loss: Tensor | float, given: Tensor | float) -> None:
        """Record a step of a script that updates its weights by hand."""
        track.add_measured(squares_L, loss, given)
        self._count(track)

    def hand_track(self, holder: Any) -> Track:
        """Begin the recording of weights that no optimizer has."""
        if self.settings.control or self.settings.guard:
            say("the script updates its weights by hand: it is only measured, --control and --guard need an optimizer")
        plain = dataclasses.replace(self.settings, control=False, guard=False)
        self._recorder = self._recorder or self._record()
        track = Track(holder, self._num_streams, plain, self._recorder, self._order)
        self._num_streams += 1
        return track

    def _start(self, optimizer: torch.optim.Optimizer) -> None:
        if self._broken or not any(p.numel() for e in optimizer.param_groups for p in e["params"]):
            return
        if self._recorder is None:
            self._recorder = self._record()
        track = Track(optimizer, self._num_streams, self.settings, self._recorder, self._order)
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
        about = {**self.settings.about, "torch": torch.__version__, "rank": rank, "world_size": world}
        about |= {"mode": "control" if self.settings.control else "watch", "command": _command(self.settings)}
        about |= {"guarded": True} if self.settings.guard else {}
        about |= {"samples": True} if self._samples is not None else {}
        sinks: list[Any] = []
        for attempt in range(_TRIES):
            self._place = free_name(name)
            try:
                self._writer = RunWriter(self._place, about, max_megabytes=self.settings.max_megabytes)
                self._writer.tell = say  # a script may silence warnings
                sinks.append(self._writer)
                break
            except RunFileError as error:
                if os.path.exists(self._place) and attempt < _TRIES - 1:
                    continue  # another process of the script has just taken the name
                self.failed = str(error)
                say(f"nothing is recorded, the training goes on ({error})")
                break
        if rank == 0:
            sinks += [sink_from_words(word, depth=self.settings.depth) for word in self.settings.to]
        recorder = _ScriptRecorder(sinks, seconds=self.settings.seconds, samples=self._samples)
        atexit.unregister(recorder.close)  # the last lengths of the weights come first
        if self._closes:
            atexit.register(self.close)
        return recorder

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
            self._broken, self.failed = True, f"watching stopped ({error!r})"
            say(f"watching stopped, the training goes on ({error!r}). Please report it with the script.")

    def flush(self) -> None:
        """Write what was recorded until now."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """End the recording, if one was begun in this process."""
        self._watchfully(self._by_hand.close)
        if self._samples is not None:
            self._samples.close()
        if self._recorder is None or self._recorder._closed or os.getpid() != self._pid:
            return
        for track in [*self._tracks.values(), *self._by_hand.tracks]:
            self._watchfully(functools.partial(track.read_weights, track.step + 1))
        self._watchfully(self._note_crash)
        self._recorder.close()

    def _note_crash(self) -> None:
        """Keep in which module an exception arose, if it arose in one."""
        trace, where = getattr(sys, "last_traceback", None), None
        roots = {id(child): name for name, child in self._modules()}
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            where = roots.get(id(owner), where) if isinstance(owner, torch.nn.Module) else where
            trace = trace.tb_next
        if where is not None and self._recorder is not None:
            self._recorder.remark({"kind": "crash", "where": where or "the model", "step": self._last_step()})

    def _modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for track in [*self._tracks.values(), *self._by_hand.tracks]:
            for root in roots_of(track.keys):
                yield from root.named_modules()

    def _last_step(self) -> int:
        return max((track.step for track in [*self._tracks.values(), *self._by_hand.tracks]), default=-1)


class _ScriptRecorder(Recorder):
    """A recorder that ends with the script and notes how it ended."""

    tell = staticmethod(say)

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
