"""Track: what is kept about one optimizer, and what happens at one of its steps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..budget import DEFAULT_OF_SPLITTER, Relative, RelativeStep
from ..plan import Layout
from ..rates import follows_gradient
from ..record import Outline, Recorder, Stream, recording_plan, summed_up
from ..splitter import GradientSplitter
from .measure import BlockReader
from .names import named_parameters_of
from .settings import Settings, budget_from_words

__all__ = ["Track", "signature"]


def signature(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """Return what changes when parameters are added, or thawed; then a new stream begins."""
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


class Track:
    """One optimizer under watch or control.

    Args:
        optimizer: whose steps they are; not kept alive.
        stream: its number in the recording.
        settings: what was asked for.
        recorder: what takes the rows.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stream: int, settings: Settings, recorder: Recorder) -> None:
        pairs = [(n, p) for n, p in named_parameters_of(optimizer) if p.numel() and _is_number(p)]
        self.parameters = [parameter for _, parameter in pairs]
        self.signature = signature(optimizer)
        self.keys = {id(parameter) for parameter in self.parameters}
        self.step, self.recorder, self.index = -1, recorder, stream
        self.last_loss: Tensor | float = float("nan")
        self._pending: _Reading | None = None
        self._missed_scale: Tensor | None = None
        self.splitter: GradientSplitter | None = None
        device = self.parameters[0].device
        layout = Layout(tuple(n for n, _ in pairs), tuple(tuple(int(k) for k in p.shape) for p in self.parameters))
        about: dict[str, Any] = {"num_parameters": layout.num_elements, "device": str(device)}
        if settings.control:
            self.splitter, budget = self._make_splitter(optimizer, pairs, settings)
            plan = self.splitter.plan
            about |= {"strategy": settings.plan, "budget": budget, "words": list(settings.budget)}
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
        self.num_leaves = outline.num_leaves
        recorder.open(Stream(stream, type(optimizer).__name__, outline, settings.control, about), device)

    @staticmethod
    def _make_splitter(
        optimizer: torch.optim.Optimizer, pairs: list[tuple[str, Tensor]], settings: Settings
    ) -> tuple[GradientSplitter, str]:
        """Without a budget: RelativeStep, and where it must cap the update itself, Relative before the moments too."""
        caps = not follows_gradient(optimizer)
        budget: Any = budget_from_words(settings.budget)
        if not budget:
            budget = {"bin": (Relative(0.2), RelativeStep()) if caps else (DEFAULT_OF_SPLITTER,)}
        bounds_update = any(one.bounds_update for several in budget.values() for one in several)
        splitter = GradientSplitter(
            pairs, settings.plan, budget, optimizer=optimizer, cap_updates=caps and bounds_update
        )
        return splitter, "; ".join(f"{level}: {', '.join(map(repr, several))}" for level, several in budget.items())

    def covers(self, keys: set[int]) -> bool:
        """Whether a set of parameters (by id) contains all of these."""
        return self.keys <= keys

    def begin_step(self) -> None:
        """Count a step of the optimizer; a closure may look at the gradients several times within one."""
        self.step += 1

    def read(self) -> None:
        """Measure the gradients as they are now, and bound them in place under control; `commit` records it."""
        self._pending = _Reading(self._measured(), self._state())

    def note_own_scale(self, factor: Tensor) -> None:
        """Note by what the script itself scaled the gradients, after `read` or before this track began."""
        if self._pending is None:
            self._missed_scale = factor
        else:
            self._pending = _Reading(self._pending.numbers, self._state(), factor)

    def commit(self, optimizer: torch.optim.Optimizer, loss: Tensor | float, rate_factor: float = 1.0) -> None:
        """Record one row for gradients that are ready; measure them now unless that has been done."""
        self.last_loss = loss
        if all(parameter.grad is None for parameter in self.parameters):
            return
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        skipped: Tensor | float = 0.0 if found_inf is None else found_inf
        if grad_scale is not None and self.splitter is not None:
            if bool(skipped):
                return  # no update is made, so that nothing is bounded and no history moves
            self._unscale(optimizer, grad_scale)
            grad_scale = None
        reading, self._pending = self._pending, None
        if reading is None or reading.state != self._state():
            reading = _Reading(self._measured(), (), self._missed_scale)
            if self._missed_scale is not None:
                factor = torch.where(torch.isfinite(self._missed_scale), self._missed_scale, 1.0)
                reading.numbers["squares_L"] = reading.numbers["squares_L"] / factor.square()
        self._missed_scale = None
        if grad_scale is not None:
            squares_L = reading.numbers["squares_L"]
            reading.numbers["squares_L"] = squares_L / grad_scale.to(squares_L.device, squares_L.dtype).square()
        self.recorder.add(
            self.index,
            self.step,
            **reading.numbers,
            loss=loss,
            lr=optimizer.param_groups[0].get("lr", float("nan")) * rate_factor,
            own_scale=1.0 if reading.own_scale is None else reading.own_scale,
            skipped=skipped,
        )
        if self.splitter is not None and self.splitter._cap is not None:
            self.splitter._cap.remember()

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
        return tuple((id(gradient), gradient._version) for gradient in (*gradients[:2], *gradients[-2:]))


def _is_number(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _plain(value: Any) -> Any:
    """A default of the optimizer as plain data; anything unusual by its text."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
