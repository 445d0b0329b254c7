"""Divergence: whether a run has diverged, from its losses, zeroed bins and, if a loss is not finite, its weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..split import StepRecord

__all__ = ["Agreement", "first_few", "nonfinite_names", "PendingLosses", "LossHistory", "Divergence"]


class Agreement:
    """Means and alarms over the processes of a group; without a process group, those of this process.

    Args:
        process_group: None: all processes.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group

    @property
    def num_processes(self) -> int:
        """How many have to agree."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes; not finite where it was not in any of them."""
        if self.num_processes > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.process_group)
            values /= self.num_processes
        return values

    def any(self, alarm: bool, optimizer: torch.optim.Optimizer) -> bool:
        """Whether any process raises the alarm; asked on the device of the optimizer's first parameter."""
        if self.num_processes == 1:
            return alarm
        flag = torch.tensor(float(alarm), device=optimizer.param_groups[0]["params"][0].device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.process_group)
        return bool(flag)


def first_few(names: Sequence[str]) -> str:
    """Name three, and say how many more there are.

    >>> first_few("abcde")
    'a, b, c and 2 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def nonfinite_names(model: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of tensors with a value that is not finite, in one pass over memory and one wait.

    A buffer may hold inf, as attention masks do; nan is bad anywhere.

    Args:
        model: has ``named_parameters()`` and ``named_buffers()``.
        optimizer: whose states per parameter are looked at, too.

    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.constant_(layer.bias, float("inf"))
    >>> nonfinite_names(layer, torch.optim.SGD(layer.parameters(), 0.1))
    ['bias']
    """
    names, sums = [], []
    for name, tensor, may_be_inf in _tensors(model, optimizer):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_sparse:
            continue
        low, high = torch.aminmax(tensor)  # both nan if any entry is
        if may_be_inf:
            low, high = low.clamp(min=-1.0, max=1.0), high.clamp(min=-1.0, max=1.0)
        names.append(name)
        sums.append(low.double().abs() + high.double().abs())
    if not names:
        return []
    device = sums[0].device
    finite = torch.isfinite(torch.stack([one.to(device) for one in sums])).tolist()
    return [name for name, ok in zip(names, finite, strict=True) if not ok]


def _tensors(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether the tensor may hold inf."""
    names = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        yield name, parameter, False
    for name, buffer in model.named_buffers():
        yield name, buffer, True
    for i, (parameter, state) in enumerate(optimizer.state.items()):
        if isinstance(state, dict):
            owner = names.get(id(parameter), f"parameter {i}")
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{owner} ({key})", value, False


class PendingLosses:
    """The losses of the steps that the guard has not judged yet, each with the share of the bins that were ZEROED.

    They stay on their device until `take` copies all of them to the host at once.

    Args:
        agreement: of the processes; each of them then reads the mean over all of them.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._kept: list[tuple[Tensor | float, Tensor | float]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, loss: Tensor | float, record: StepRecord | None, *, copy: bool) -> None:
        """Add the loss of one step.

        Args:
            loss: a number, or a tensor of one entry.
            record: of the splitter, if there is one.
            copy: keep a copy of the loss, because it is read at a later step.
        """
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
            loss = loss.detach().reshape(())
            loss = loss.clone() if copy else loss
        elif isinstance(loss, Tensor) or not hasattr(loss, "__float__") or getattr(loss, "size", 1) != 1:
            what = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"Guard.step(loss={what}): expected the number that backward was called on. Pass loss.mean(), or a "
                "float."
            )
        zeroed: Tensor | float = 0.0
        if record is not None:
            zeroed = (~record.decision.finite_B).to(torch.float32).mean()
        self._kept.append((loss, zeroed))

    def take(self) -> list[tuple[float, float]]:
        """Return the loss and the share of each step, and start anew. Waits for the device."""
        kept, self._kept = self._kept, []
        alone = self._agreement.num_processes == 1
        if alone and (len(kept) == 1 or not any(isinstance(value, Tensor) for pair in kept for value in pair)):
            return [(float(loss), float(zeroed)) for loss, zeroed in kept]
        device = next((v.device for pair in kept for v in pair if isinstance(v, Tensor)), torch.device("cpu"))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        table = torch.stack(
            [torch.as_tensor(value, dtype=dtype, device=device) for pair in kept for value in pair]
        ).reshape(len(kept), 2)
        return [(loss, zeroed) for loss, zeroed in self._agreement.mean(table).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return the losses and the shares, as plain numbers."""
        return {"kept": [[float(loss), float(zeroed)] for loss, zeroed in self._kept]}

    def load_state_dict(self, state: dict[str, Sequence[Sequence[float]]]) -> None:
        """Undo `state_dict`."""
        self._kept = [(float(loss), float(zeroed)) for loss, zeroed in state["kept"]]


LEAST = 16  # losses before which nothing is judged
FLOOR = 0.05  # of the median: the least spread, since a loss that hardly varied may still rise by a few per cent
SMALL = 0.02  # of the loss at the start: the least spread where the losses are close to 0 by now


class LossHistory:
    """The last losses that were in order, and how far a new one is above them.

        score = (loss - median) / max(1.4826 MAD, 0.05 |median|, 0.02 start)

    A loss is *out* if it is not finite, or if its score is above ``score``. A few spikes hardly move the median and the
    median absolute deviation (MAD). The caller adds only losses that are not out. ``start`` is the run's own scale, the
    median size of its first 16 losses, zeros left out: hinge losses, usually 0, have no other. Without it none is out.

    Args:
        length: losses kept.
        score: no unit.

    >>> history = LossHistory(128, 10.0)
    >>> for k in range(20):
    ...     history.add(1.0 + 0.01 * (k % 3))
    >>> history.median, history.is_out(1.4), history.is_out(2.0), history.is_out(math.nan)
    (1.01, False, True, True)
    """

    def __init__(self, length: int, score: float) -> None:
        self.length, self.score = length, score
        self._losses: deque[float] = deque(maxlen=length)  # lists: numpy's calls cost more than 128 numbers do
        self._first: list[float] = []
        self._summary: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: float) -> None:
        """Take in a loss that is in order."""
        self._losses.append(loss)
        if len(self._first) < LEAST:
            self._first.append(loss)
        self._summary = None

    def is_out(self, loss: float) -> bool:
        """Whether a loss is out. A finite loss is never out before there are 16 losses to judge by."""
        if not math.isfinite(loss):
            return True
        if len(self) < LEAST:
            return False
        median, spread = self._numbers()
        return spread > 0 and loss - median > self.score * spread

    @property
    def median(self) -> float:
        """The usual loss; nan without a history."""
        return self._numbers()[0] if len(self) else math.nan

    @property
    def spread(self) -> float:
        """What a score of 1 is, in units of the loss; nan without a history."""
        return self._numbers()[1] if len(self) else math.nan

    def _numbers(self) -> tuple[float, float]:
        if self._summary is None:
            median = _median(self._losses)
            deviation = _median([abs(loss - median) for loss in self._losses])
            start = _median([abs(loss) for loss in self._first if loss] or [0.0])
            self._summary = (median, max(1.4826 * deviation, FLOOR * abs(median), SMALL * start))
        return self._summary

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, oldest first, as plain data."""
        return {"losses": list(self._losses), "first": list(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take losses over; the last ones, if this history is shorter."""
        losses = [float(loss) for loss in state["losses"]]
        self._losses = deque(losses, maxlen=self.length)
        self._first = [float(loss) for loss in state.get("first", losses[:LEAST])]  # files of before have none
        self._summary = None


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


MOST = 0.5  # share of bins ZEROED above which a step counts as bad


class Divergence:
    """Judge step after step.

    A step is bad if its loss is out of its history, or if most bins were ZEROED. A run has diverged if ``patience``
    consecutive steps were bad. It has diverged at once if a loss is not finite and a weight, buffer or state is not
    finite either. A single bad batch without an update, stopped by a splitter or a GradScaler, leaves everything finite
    and does no harm.

    Args:
        model: see `nonfinite_names`.
        optimizer: likewise.
        history: of the losses.
        patience: consecutive bad steps.
        agreement: over processes.

    Attributes:
        bad: consecutive bad steps so far.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        history: LossHistory,
        patience: int,
        agreement: Agreement,
    ) -> None:
        self.model, self.optimizer, self.history = model, optimizer, history
        self.patience, self.agreement = patience, agreement
        self.bad = 0

    def reason(self, loss: float, zeroed: float) -> str:
        """Return why the run has diverged at this step; empty if it has not.

        Args:
            loss: the same in all processes.
            zeroed: share of bins ZEROED, likewise.
        """
        if not self.history.is_out(loss) and zeroed <= MOST:
            self.bad = 0
            self.history.add(loss)
            return ""
        self.bad += 1
        if not math.isfinite(loss):
            lost = nonfinite_names(self.model, self.optimizer)
            if self.agreement.any(bool(lost), self.optimizer):
                shown = first_few(lost) or "tensors of another process"
                return f"the loss is {loss:g} and these are not finite: {shown}"
        if self.bad < self.patience:
            return ""
        return (
            f"{self.bad} steps in a row were bad: loss {loss:.4g}, usually {self.history.median:.4g} and at most "
            f"{self.history.score:g} x {self.history.spread:.2g} above, {zeroed:.0%} of bins ZEROED"
        )
