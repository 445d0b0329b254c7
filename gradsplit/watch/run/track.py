"""Track: what is kept about one optimizer, and what happens at one of its steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...distributed import add_over, is_sharded, local_of, place_of
from ...optim import GSO
from ...optimizers import follows_gradient
from ...plan import Layout, Plan
from ...split import ShareRecord
from ...splitter import GradientSplitter
from ..record import Outline, Recorder, Stream, next_reading, recording_plan, summed_up
from .names import named_parameters_of
from .settings import Settings, budget_from_words, words_of_budget

__all__ = ["BlockReader", "Track", "signature"]


class BlockReader:
    """Squares of the bins of a plan whose bins are whole rows, such as `recording_plan` makes.

    Of sharded gradients (DTensor) each rank reads the rows that it holds. One all-reduce per mesh dimension that shards
    anything adds them up, so that every rank has the same numbers. Plain gradients need no communication.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.num_blocks, self.device = plan.num_bins, device
        bounds = plan.boxes.slices_T(len(plan.layout))
        self._rows_T: list[Tensor | int] = []
        for t, rows in enumerate(plan.layout.rows):
            part = slice(bounds[t], bounds[t + 1])
            blocks = plan.bin_K[part]
            if len(blocks) == 0:
                self._rows_T.append(-1)
            elif len(blocks) == 1:
                self._rows_T.append(int(blocks[0]))
            else:
                sizes = plan.row_stop_K[part] - plan.row_start_K[part]
                assert sizes.sum() == rows, "blocks must be whole rows"
                self._rows_T.append(torch.from_numpy(np.repeat(blocks, sizes)).to(device))
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._single: dict[tuple[int, ...], Tensor] = {}  # blocks of the tensors that are one block, as indices

    @torch.no_grad()
    def squares(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return (L,) sums of squares, float64; not finite where an entry was not. Changes nothing."""
        rows_of: list[Tensor] = []  # of tensors that are several blocks
        single: list[int] = []
        many: list[Tensor] = []  # and what there is of them here
        whole: list[Tensor] = []
        sharded: dict[tuple[Any, int], list[int]] = {}
        for t, gradient in enumerate(gradients):
            rows = self._rows_T[t]
            if gradient is None or (isinstance(rows, int) and rows < 0):
                continue
            first_row = 0
            if is_sharded(gradient):
                for dim, placement in enumerate(gradient.placements):
                    if not placement.is_replicate():
                        sharded.setdefault((gradient.device_mesh, dim), []).append(t)
                _, offset = place_of(gradient)
                gradient, first_row = local_of(gradient), offset[0] if len(offset) > 1 else 0
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                if isinstance(rows, Tensor):
                    rows = rows[gradient.indices()[0].to(rows.device)]
                gradient = gradient.values()
            if gradient.numel() == 0:
                continue
            if isinstance(rows, int):
                single.append(rows)
                whole.append(gradient)
            else:
                rows_of.append(rows[first_row : first_row + gradient.shape[0]])
                many.append(gradient)
        squares_L = self._sums(rows_of, many, single, whole, exact=self.device.type != "cpu")
        if self.device.type == "cpu" and not math.isfinite(float(squares_L.sum())):
            squares_L = self._sums(rows_of, many, single, whole, exact=True)
        return self._shared(squares_L, sharded) if sharded else squares_L

    def _sums(
        self, rows_of: list[Tensor], many: list[Tensor], single: list[int], whole: list[Tensor], *, exact: bool
    ) -> Tensor:
        """Sums of squares by block; exact: norms in float64, otherwise in the gradient's own precision.

        Of a CPU the caller checks the result and asks again. Elsewhere a look at it would wait.
        """
        squares_L = torch.zeros(self.num_blocks, dtype=self._dtype, device=self.device)
        if many:
            norms = [self._norm(gradient, tuple(range(1, gradient.dim())), exact=exact) for gradient in many]
            squares_L.index_add_(0, torch.cat(rows_of), self._joined(norms, torch.cat).square())
        if whole:
            norms = [self._norm(gradient, None, exact=exact) for gradient in whole]
            key = tuple(single)
            if key not in self._single:
                self._single[key] = torch.tensor(single, device=self.device)
            squares_L.index_add_(0, self._single[key], self._joined(norms, torch.stack).square())
        return squares_L

    def _joined(self, norms: list[Tensor], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """One vector; of one dtype and device it is widened as a whole."""
        first = norms[0]
        if any(norm.dtype != first.dtype or norm.device != self.device for norm in norms):
            norms = [norm.to(self.device, self._dtype) for norm in norms]
        return join(norms).to(self._dtype)

    def _norm(self, gradient: Tensor, dims: tuple[int, ...] | None, *, exact: bool) -> Tensor:
        wide: torch.dtype | None = None
        if exact:
            wide = self._dtype.to_complex() if gradient.is_complex() else self._dtype
        elif gradient.dtype in (torch.float16, torch.bfloat16):
            wide = torch.float32
        norm: Tensor = torch.linalg.vector_norm(gradient, dim=dims, dtype=wide)
        return norm

    def _shared(self, squares_L: Tensor, sharded: dict[tuple[Any, int], list[int]]) -> Tensor:
        """Add up over ranks what is sharded, leaving what every rank holds whole."""
        for (mesh, dim), tensors in sharded.items():
            here = torch.zeros(self.num_blocks, dtype=torch.bool, device=self.device)
            for t in tensors:
                rows = self._rows_T[t]
                here[rows] = True
            part = torch.where(here, squares_L, torch.zeros_like(squares_L))
            squares_L = torch.where(here, add_over(mesh.get_group(dim), part), squares_L)
        return squares_L


def signature(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """Return what changes when parameters are added, or unfrozen; then a new stream begins."""
    return tuple(
        value
        for entry in optimizer.param_groups
        for value in (len(entry["params"]), sum(p.requires_grad for p in entry["params"]))
    )


@dataclass
class _Reading:
    """Numbers of a row before it is recorded, the state of the gradients then, and what the script did after."""

    numbers: dict[str, Tensor]
    state: tuple[tuple[int, int], ...]
    own_scale: Tensor | None = None


_FIRST_TURNS = 8  # the first step of GSO whose turns are read; a step that is traced is traced without them
_MOST_AT_ONCE = 200  # readings of the weights beside the regular ones, where the gradient jumped
_JUMP = 64.0  # of the square of the whole gradient from one step to the next
_JUMP_OF_PART = 1e4  # of the square of a tensor's, up or down: parts are noisy
_MOVED = 1.5  # of a tensor's length from one step to the next, where the lengths are read at every step


class Track:
    """One optimizer under watch or control.

    Args:
        optimizer: whose steps they are; not kept alive.
        stream: its number in the recording.
        settings: what was asked for.
        recorder: what takes the rows.
        order: id(parameter) -> place in the forward pass, as far as it is known.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        stream: int,
        settings: Settings,
        recorder: Recorder,
        order: Mapping[int, int] | None = None,
    ) -> None:
        pairs = [(n, p) for n, p in named_parameters_of(optimizer) if p.numel() and _is_number(p)]
        self.parameters = [parameter for _, parameter in pairs]
        self.names = [name for name, _ in pairs]
        self.signature = signature(optimizer)
        self.keys = {id(parameter) for parameter in self.parameters}
        self.step, self.recorder, self.index, self.num_rows = -1, recorder, stream, 0
        self.last_loss: Tensor | float = float("nan")
        self._pending: _Reading | None = None
        self._missed_scale: Tensor | None = None
        self._next_lengths, self._at_once = 0, 0
        self._next_turns, self._turns_at = _FIRST_TURNS, -1
        self._last_squares: np.ndarray | None = None
        self._last_lengths: tuple[int, Tensor] | None = None
        self._floor_T = torch.tensor([0.01 * p.numel() ** 0.5 for p in self.parameters])  # what starts at 0 grows fast
        self._last_read = -1
        self._small = sum(p.numel() for p in self.parameters) <= 100_000 and self.parameters[0].device.type == "cpu"
        self._whole = not any(hasattr(parameter, "device_mesh") for parameter in self.parameters)
        self.splitter: GradientSplitter | None = None
        device = self.parameters[0].device
        layout = Layout(tuple(n for n, _ in pairs), tuple(tuple(int(k) for k in p.shape) for p in self.parameters))
        about: dict[str, Any] = {"num_parameters": layout.num_elements, "device": str(device)}
        if settings.control:
            self.splitter, bounds = self._make_splitter(optimizer, pairs, settings)
            plan, about = self.splitter.plan, about | bounds
            outline = Outline.of(plan, max_nodes=settings.max_nodes)
            self._leaf_of_bin_B = torch.from_numpy(outline.leaf_of_bin_B).to(device)
        else:
            plan = recording_plan(layout, max_nodes=settings.max_nodes)
            outline = Outline.of(plan, max_nodes=settings.max_nodes)
            self._reader = BlockReader(plan, device)
        about |= {
            "names": list(layout.names),
            "shapes": [list(shape) for shape in layout.shapes],
            "dtypes": sorted({str(parameter.dtype) for parameter in self.parameters}),
            "num_bins": plan.num_bins,
            "plan": plan.fingerprint,
            "defaults": {key: _plain(value) for key, value in optimizer.defaults.items()},
        }
        places = [(order or {}).get(id(parameter), -1) for parameter in self.parameters]
        if all(place >= 0 for place in places):
            about["forward_order"] = np.argsort(places, kind="stable").tolist()
        self.num_leaves = outline.num_leaves
        known = {name: t for t, name in enumerate(dict.fromkeys(outline.tensors_L))}
        self._tensor_L = np.array([known[name] for name in outline.tensors_L])
        recorder.open(Stream(stream, type(optimizer).__name__, outline, settings.control, about), device)
        if recorder.samples is not None:
            recorder.samples.watch.name(stream, {id(parameter): name for name, parameter in pairs})

    @staticmethod
    def _make_splitter(
        optimizer: torch.optim.Optimizer, pairs: list[tuple[str, Tensor]], settings: Settings
    ) -> tuple[GradientSplitter, dict[str, Any]]:
        """A splitter as `GradientSplitter` makes it; a cap stands behind the optimizer where a budget asks for one."""
        budget: Any = budget_from_words(settings.budget) or None
        bounds_update = any(one.bounds_update for several in (budget or {}).values() for one in several)
        caps = bounds_update and not follows_gradient(optimizer)
        try:
            splitter = GradientSplitter(
                pairs, settings.plan, budget, cap_updates=caps, collective=True if settings.collective else None
            )
            splitter._stand_by(optimizer)  # and not attached: steps are read where they are recorded
        except ValueError as error:
            asked = "".join(f" --budget {word}" for word in settings.budget)
            fits = f" Without --budget, --control takes the default that fits {type(optimizer).__name__}."
            raise ValueError(f"gradsplit run --control{asked}: {error}{fits if asked else ''}") from error
        held = splitter._split
        budgets = [*held.gradient_budgets, *held.update_budgets]
        about = {
            "strategy": settings.plan,
            "budget": "; ".join(f"{level}: {one!r}" for level, one in budgets),
            "words": [words_of_budget(level, one) for level, one in budgets],
            "collective": held.recent is not None,
        }
        return splitter, about

    def covers(self, keys: set[int]) -> bool:
        """Whether a set of parameters (by id) contains all of these."""
        return self.keys <= keys

    def begin_step(self) -> None:
        """Count one step of the optimizer; a closure may read the gradients several times within it."""
        self.step += 1
        if self.splitter is not None:
            self.splitter._start()  # the first call of a closure decides, and the others follow

    def read(self) -> None:
        """Measure the gradients as they are now, and bound them in place under control; `commit` records it."""
        self._pending = _Reading(self._measured(), self._state())

    def note_own_scale(self, factor: Tensor) -> None:
        """Note by what the script itself scaled the gradients, after `read` or before this track began."""
        if self._pending is None:
            self._missed_scale = factor
        else:
            self._pending = _Reading(self._pending.numbers, self._state(), factor)

    def commit(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor | float,
        rate_factor: float = 1.0,
        *,
        given: Tensor | float = float("nan"),
        not_made: bool = False,
    ) -> None:
        """Record one row for gradients that are ready; measure them now unless that has been done.

        Args:
            optimizer: whose step it is.
            loss: of the step.
            rate_factor: by which a guard multiplies the rates.
            given: how large the batch was, see `Given`.
            not_made: a gradient scaler lets no step follow.
        """
        self.last_loss = loss
        if isinstance(optimizer, GSO) and optimizer.by_share:
            self._watch_turns(optimizer, not_made=not_made)
        if not_made and self.splitter is not None:
            self._pending = self._missed_scale = None
            return  # no update is made, so that nothing is bounded and no history moves
        if all(parameter.grad is None for parameter in self.parameters):
            return
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        skipped: Tensor | float = (1.0 if not_made else 0.0) if found_inf is None else found_inf
        if grad_scale is not None and self.splitter is not None:
            if bool(skipped):
                return  # no update is made, so that nothing is bounded and no history moves
            self._unscale(optimizer, grad_scale)
            grad_scale = None
        reading, self._pending = self._pending, None
        if reading is None or reading.state != self._state() or self._looks_again(reading):
            # What the optimizer reads is measured; what the script's own clip did is a column of its own.
            own = self._missed_scale if reading is None else reading.own_scale
            reading = _Reading(self._measured(), (), own)
            if own is not None:
                factor = torch.where(torch.isfinite(own) & (own > 0), own, 1.0)
                reading.numbers["squares_L"] = reading.numbers["squares_L"] / factor.square()
        self._missed_scale = None
        if grad_scale is not None:
            squares_L = reading.numbers["squares_L"]
            reading.numbers["squares_L"] = squares_L / grad_scale.to(squares_L.device, squares_L.dtype).square()
        self.num_rows += 1
        self.recorder.add(
            self.index,
            self.step,
            **reading.numbers,
            loss=loss,
            lr=optimizer.param_groups[0].get("lr", float("nan")) * rate_factor,
            own_scale=1.0 if reading.own_scale is None else reading.own_scale,
            skipped=skipped,
            given=given,
        )
        self._watch_weights(reading.numbers["squares_L"])

    def _looks_again(self, reading: _Reading) -> bool:
        """Whether small gradients on a CPU are measured again at the step: writes through ``.data`` leave no trace."""
        if not self._small or self.splitter is not None:
            return False
        return reading.own_scale is None or bool(torch.isfinite(reading.own_scale))

    def add_measured(self, squares_L: Tensor, loss: Tensor | float, given: Tensor | float) -> None:
        """Record a row whose gradients were measured before: a step of a script that updates its weights by hand."""
        self.begin_step()
        self.num_rows += 1
        self.recorder.add(self.index, self.step, squares_L, loss=loss, given=given)
        self._watch_weights(squares_L)

    def _watch_weights(self, squares_L: Tensor) -> None:
        """Read the lengths of the weights thinly: seldom, and where a gradient or a weight has just jumped."""
        jumped = self._jumped(squares_L) if squares_L.device.type == "cpu" else False  # elsewhere it would wait
        if self._small and self._whole:
            jumped = self._note_moved() or jumped
        jumped = jumped and self._at_once < _MOST_AT_ONCE
        if self.step >= self._next_lengths or jumped:
            self._at_once += self.step < self._next_lengths
            self._next_lengths = next_reading(self.step)
            self.read_weights()

    def _watch_turns(self, optimizer: GSO, *, not_made: bool) -> None:
        """Record what the step before did, if it measured it, and let this one measure if its turn has come."""
        if self._turns_at >= 0:
            place = {id(parameter): t for t, parameter in enumerate(self.parameters)}
            values, factor = torch.full((3, len(place)), torch.nan, device=self.parameters[0].device), torch.ones(())
            for owners, record in optimizer.records_of():
                at = [(i, place[id(p)]) for i, p in enumerate(owners) if id(p) in place]
                if isinstance(record, ShareRecord):
                    values[:, [t for _, t in at]] = record.by_tensor()[:, [i for i, _ in at]].to(values)
                    factor = record.factor
            self.recorder.add_turns(self.index, self._turns_at, factor, values)
            optimizer.measures, self._turns_at = False, -1
        if self.step >= self._next_turns and not not_made and not optimizer.measures:
            optimizer.measures, self._turns_at, self._next_turns = True, self.step, next_reading(self.step)

    def _jumped(self, squares_L: Tensor) -> bool:
        """Whether the whole gradient, or a part of it, is far from what it was one step ago, or not finite."""
        # By tensor: the rows of an embedding come and go with their words. In NumPy, since small tensors are slow.
        squares_T = np.bincount(self._tensor_L, squares_L.numpy())
        last, self._last_squares = self._last_squares, squares_T
        if last is None:
            return False
        known = (last > 0) & (last < np.inf)  # what was 0 before tells nothing
        odd_T = (squares_T > _JUMP_OF_PART * last) | (squares_T < last / _JUMP_OF_PART)
        total, before = float(squares_T.sum()), float(last.sum())
        return bool((odd_T & known).any()) or not math.isfinite(total) or total > _JUMP * before

    def _note_moved(self) -> bool:
        """Whether a tensor's length has jumped since the step before; then that step's lengths are recorded, too."""
        lengths = _lengths([parameter.detach() for parameter in self.parameters])
        last, self._last_lengths = self._last_lengths, (self.step, lengths)
        if last is None or not bool((lengths > _MOVED * torch.maximum(last[1], self._floor_T)).any()):
            return False
        if self._at_once < _MOST_AT_ONCE and last[0] > self._last_read:
            self.recorder.add_lengths(self.index, *last)
        return True

    @torch.no_grad()
    def read_weights(self, step: int | None = None) -> None:
        """Record the length of every tensor as it is now; of sharded tensors no process has the whole."""
        if not self._whole or any(parameter.is_meta for parameter in self.parameters):
            return
        self._last_read = self.step if step is None else step
        lengths = [parameter.detach() for parameter in self.parameters]
        self.recorder.add_lengths(self.index, self._last_read, _lengths(lengths))

    def _measured(self) -> dict[str, Tensor]:
        if self.splitter is None:
            return {"squares_L": self._reader.squares([parameter.grad for parameter in self.parameters])}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a step without gradients is the script's business
            record = self.splitter.step()
        return summed_up(record, self._leaf_of_bin_B, self.num_leaves)

    def _unscale(self, optimizer: torch.optim.Optimizer, grad_scale: Tensor) -> None:
        """Do what ``scaler.unscale_(optimizer)`` does for an optimizer that would have done it itself."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / grad_scale.to(parameter.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def after_update(self) -> None:
        """Bound the update that the optimizer made, where a budget bounds updates."""
        if self.splitter is not None:
            self.splitter._after_update()

    def _state(self) -> tuple[tuple[int, int], ...]:
        """What differs once anybody has written to the gradients since."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return tuple((id(gradient), gradient._version) for gradient in gradients)


def _lengths(tensors: list[Tensor]) -> Tensor:
    """(T,) L2 lengths, in one dtype on one device."""
    half = (torch.float16, torch.bfloat16)
    plain = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    wide = [t.to(torch.float32) if t.dtype in half else t for t in plain]
    device = wide[0].device
    return torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm(wide)])


def _is_number(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _plain(value: Any) -> Any:
    """A default of the optimizer as plain data; anything unusual by its text."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
