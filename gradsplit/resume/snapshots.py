"""Snapshots of a run in memory or on disk, a stated number of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..rates import LOWERED
from .checkpoint import load_tree, read_tree, save_tree, tree_of
from .generators import generators_state
from .plain import CheckpointError, copied

__all__ = ["DiskSnapshots", "MemorySnapshots", "Snapshot", "restore", "LoweredRate"]


@dataclass
class Snapshot:
    """The state of a run between two steps.

    Attributes:
        step: guarded steps before it.
        num_updates: updates that the weights in it have gone through.
        places: epoch and position of each data loader that is known.
        tree: the states, on the host; None where they are on disk.
        path: the file, if any.
    """

    step: int
    num_updates: int
    places: list[tuple[int, int]]
    tree: dict[str, Any] | None = None
    path: Path | None = None


class Snapshots:
    """The newest ``keep`` snapshots, oldest first."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._taken: list[Snapshot] = []

    def __len__(self) -> int:
        return len(self._taken)

    def wait(self) -> None:
        """Wait until every snapshot is where it can be read; those that could not be written are forgotten."""

    @property
    def newest(self) -> Snapshot | None:
        """None before the first."""
        return self._taken[-1] if self._taken else None


class MemorySnapshots(Snapshots):
    """The newest ``keep`` snapshots in host memory; memory of old ones is used again.

    Copies from a GPU are ordered on its stream and not waited for.
    """

    def __init__(self, keep: int) -> None:
        super().__init__(keep)
        self._free: list[dict[str, Any]] = []

    def take(self, snapshot: Snapshot, parts: Mapping[str, Any]) -> None:
        """Copy the states of the parts."""
        if len(self._taken) == self.keep:
            self._discard(0)
        # States are not checked for plain data: nothing leaves the process, and sharded tensors are welcome.
        states = {name: part.state_dict() for name, part in parts.items()}
        tree = {
            "parts": states,
            "objects": list(parts),
            "generators": generators_state(),
            "buffers": _buffers_beside(states, parts),
        }
        snapshot.tree = copied(tree, self._free.pop() if self._free else None, wait=False)
        self._taken.append(snapshot)

    def tree(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the states, for reading only."""
        assert snapshot.tree is not None
        _wait_for_copies()
        return snapshot.tree

    def discard_newest(self) -> None:
        """Forget the newest."""
        self._discard(-1)

    def clear(self) -> None:
        """Forget all."""
        while self._taken:
            self._discard(-1)

    def _discard(self, place: int) -> None:
        tree = self._taken.pop(place).tree
        if tree is not None:
            self._free.append(tree)


class DiskSnapshots(Snapshots):
    """The newest ``keep`` snapshots as checkpoints in a folder, written by a thread; one copy in memory.

    Args:
        folder: made if it is not there; files are called ``step-00000100.ckpt``.
        keep: files.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        super().__init__(keep)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._buffer: dict[str, Any] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gradsplit-snapshots")
        self._writing: Future[None] | None = None

    def take(self, snapshot: Snapshot, parts: Mapping[str, Any]) -> None:
        """Copy the states of the parts, and leave the writing to the thread."""
        self.wait()
        tree = tree_of(parts)
        tree["buffers"] = _buffers_beside(tree["parts"], parts)
        self._buffer = copied(tree, self._buffer, wait=False)
        snapshot.path = self.folder / f"step-{snapshot.step:08d}.ckpt"
        self._taken.append(snapshot)
        self._writing = self._thread.submit(self._write, snapshot, self._buffer)

    def _write(self, snapshot: Snapshot, tree: dict[str, Any]) -> None:
        assert snapshot.path is not None
        _wait_for_copies()
        save_tree(snapshot.path, tree)
        while len(self._taken) > self.keep:
            self._remove(self._taken.pop(0))

    def wait(self) -> None:
        """As said; a file that could not be written is given up with a warning."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            failed = self._taken.pop()
            warnings.warn(
                f"gradsplit: the snapshot {failed.path} could not be written, the training goes on ({error}).",
                RuntimeWarning,
                stacklevel=2,
            )

    def tree(self, snapshot: Snapshot) -> dict[str, Any]:
        """Read the states back, verified.

        Raises:
            CheckpointError: the file has been changed or removed.
        """
        self.wait()
        if snapshot.path is None:
            raise CheckpointError("Guard: expected a snapshot that was written, got none.")
        return read_tree(snapshot.path)

    def discard_newest(self) -> None:
        """Remove the newest file."""
        self.wait()
        self._remove(self._taken.pop())

    def clear(self) -> None:
        """Forget all; the files stay."""
        self.wait()
        self._taken = []

    @staticmethod
    def _remove(snapshot: Snapshot) -> None:
        if snapshot.path is not None:
            snapshot.path.unlink(missing_ok=True)


def _wait_for_copies() -> None:
    """Wait until what was copied from a GPU has arrived."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _buffers_beside(states: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, dict[str, Tensor | None]]:
    """By part, the buffers that its state does not hold: not persistent, or None."""
    return {
        name: {place: own[key] for place, own, key, _ in _buffers(part) if place not in states[name]}
        for name, part in parts.items()
        if isinstance(part, nn.Module)
    }


def _buffers(model: nn.Module) -> list[tuple[str, dict[str, Tensor | None], str, bool]]:
    """The name of every buffer, its module's dict and key, and whether it is persistent."""
    return [
        (f"{path}.{key}" if path else key, module._buffers, key, key not in module._non_persistent_buffers_set)
        for path, module in model.named_modules()
        for key in module._buffers
    ]


def _set_back(model: nn.Module, state: dict[str, Any], beside: Mapping[str, Tensor | None]) -> list[str]:
    """Set back the buffers that a state does not hold, and give the others the shapes that they had.

    Args:
        model: whose buffers.
        state: of the model; a buffer that has come since is put into it as it is.
        beside: from `_buffers_beside`.

    Returns:
        The names of those that could not be set back.
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    lost = set(beside)
    for place, own, key, persistent in _buffers(model):
        now = own[key]
        lost.discard(place)
        if place in beside:
            saved = beside[place]
            try:
                if saved is None or now is None or (now.shape, now.dtype) != (saved.shape, saved.dtype):
                    raise RuntimeError  # as torch does for a buffer that cannot be written to
                now.copy_(saved)
            except RuntimeError:
                own[key] = None if saved is None else saved.to(device if now is None else now.device, copy=True)
        elif place in state:
            if now is None or now.shape != state[place].shape:
                own[key] = torch.empty_like(state[place], device=device if now is None else now.device)
        elif now is not None:
            lost.add(place)
            if persistent:
                state[place] = now
    for path, module in model.named_modules():
        for key, tensor in vars(module).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and bool(tensor.detach().isnan().any()):
                lost.add(f"{path}.{key}" if path else key)
    return sorted(lost)


def restore(tree: Mapping[str, Any], states: Mapping[str, Any]) -> list[str]:
    """Set model, optimizer, splitter, scheduler and others back, and the gradients to 0.

    The splitter goes on counting its steps, because their numbers name rows of a recording. Without a scheduler the
    learning rates stay as they are, because the script that sets them goes on.

    Args:
        tree: of a snapshot.
        states: the objects by name.

    Returns:
        The names of what could not be set back: buffers that have come or gone since the snapshot, and tensors with
        NaN that modules hold without having registered them.
    """
    optimizer, splitter = states["optimizer"], states.get("splitter")
    count = getattr(splitter, "step_count", None)
    rates = [entry.get("lr") for entry in optimizer.param_groups]
    rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
    lost, parts = [], dict(tree["parts"])
    for name, beside in tree["buffers"].items():
        parts[name] = dict(parts[name])
        lost += _set_back(states[name], parts[name], beside)
    load_tree({**tree, "parts": parts}, states, call="Guard", generators=False, undo=False)
    if splitter is not None and count is not None:
        splitter.step_count = count
    if "scheduler" not in states:
        for entry, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                entry["lr"] = rate
    optimizer.zero_grad(set_to_none=False)  # code that reads gradients after a step still finds them
    return lost


class LoweredRate:
    """Multiply the learning rates when a step begins and set them back when it ends.

    So the factor acts on the rates of a scheduler and on those of the script, and neither of the two reads it.

    Args:
        optimizer: whose rates.
        before_step: called before every step.

    Deviation: an optimizer that updates inside ``backward()`` does so outside of its step, at its full rate.

    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> sgd = torch.optim.SGD([w], lr=1.0)
    >>> lowered = LoweredRate(sgd)
    >>> lowered.factor, w.grad = 0.5, torch.ones(1)
    >>> sgd.step()
    >>> w.item(), sgd.param_groups[0]["lr"]
    (-0.5, 1.0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before_step: Callable[[], Any] | None = None) -> None:
        self.factor = 1.0
        self._before_step = before_step
        self._own: list[tuple[dict[str, Any], Any, Any]] = []  # entry of param_groups, its rate, the lowered one
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._lower),
            optimizer.register_step_post_hook(self._set_back),
        ]

    def remove(self) -> None:
        """Detach from the optimizer."""
        while self._handles:
            self._handles.pop().remove()

    def _lower(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._set_back()  # a step that raised has not come to its end
        if self._before_step is not None:
            self._before_step()
        setattr(optimizer, LOWERED, self.factor != 1.0)
        if self.factor == 1.0:
            return
        for entry in optimizer.param_groups:
            own = entry.get("lr", 0.0)
            if isinstance(own, Tensor):  # compiled and captured steps hold on to this very tensor
                saved = own.clone()
                own.mul_(self.factor)
                self._own.append((entry, saved, own))
            else:
                entry["lr"] = own * self.factor
                self._own.append((entry, own, entry["lr"]))

    def _set_back(self, *_: Any) -> None:
        for entry, own, lowered in self._own:
            if isinstance(own, Tensor):
                lowered.copy_(own)
            elif entry["lr"] == lowered:  # else somebody has set it since
                entry["lr"] = own
        self._own = []
