"""Scripts that update their weights by hand: a backward pass whose gradients were cleared after it is a step."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...plan import Layout
from ..record import recording_plan
from .names import parameters_of
from .patched import leaves_in_order
from .track import BlockReader, Track

if TYPE_CHECKING:
    from .session import Session

__all__ = ["ByHand", "HandUpdates"]

_SURE = 3  # passes whose gradients were cleared unused by the optimizer that has them: it does not step, or not so


class ByHand:
    """Stands for the optimizer that a script has not: leaves that it updates by hand."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": leaves}]
        self.defaults: dict[str, Any] = {}


class HandUpdates:
    """Backward passes of a script without an optimizer, a row for each whose gradients were cleared after it.

    A gradient that is still there at the next backward pass is being accumulated; one that is gone has been used. The
    first step of an optimizer ends this for good.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._holder: ByHand | None = None
        self._reader: BlockReader | None = None
        self._waiting: list[tuple[Tensor, Tensor | float, Tensor | float]] = []  # used, but not yet known to be updates
        self._last: Tensor | None = None
        self._used, self._off = False, False
        self.tracks: list[Track] = []

    def stop(self) -> None:
        """An optimizer has stepped."""
        if not self._off:
            self._off, self._holder, self._reader, self._last = True, None, None, None
            self._waiting = []

    @torch.no_grad()
    def before_backward(self, loss: Tensor) -> None:
        """Look whether the gradients of the pass before were used."""
        if self._off:
            return
        if self._holder is None:
            leaves = [leaf for leaf in leaves_in_order(loss) if leaf.is_leaf and leaf.numel()]
            if leaves:
                self._holder = ByHand(leaves)
                layout = Layout(tuple(map(str, range(len(leaves)))), tuple(tuple(leaf.shape) for leaf in leaves))
                plan = recording_plan(layout, max_nodes=self._session.settings.max_nodes)
                self._reader = BlockReader(plan, leaves[0].device)
        elif self._last is not None and float(self._squares().sum()) == 0 != float(self._last.sum()):
            self._use()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Measure."""
        if not self._off and self._holder is not None:
            self._last = self._squares()

    def close(self) -> None:
        """Take the last pass for an update, where those before it were."""
        if not self._off and self.tracks and self._last is not None and not self._used:
            self._use(last=True)
            self._used = True

    def _squares(self) -> Tensor:
        assert self._holder is not None and self._reader is not None
        return self._reader.squares([leaf.grad for leaf in self._holder.param_groups[0]["params"]])

    def _use(self, *, last: bool = False) -> None:
        assert self._last is not None
        session = self._session
        # Before the next backward pass the sum of losses has the new one already.
        loss = session.losses.take() if last else session.losses.take_before()
        self._waiting.append((self._last, loss, session.given.take()))
        self._last = None
        if not self.tracks and len(self._waiting) < (1 if self._free() else _SURE):
            return
        if not self.tracks:
            self.tracks.append(session.hand_track(self._holder))
        waiting, self._waiting = self._waiting, []
        for squares_L, of_pass, given in waiting:
            session.hand_row(self.tracks[0], squares_L, of_pass, given)

    def _free(self) -> bool:
        """Whether no living optimizer has any of these leaves."""
        assert self._holder is not None
        mine = {id(leaf) for leaf in self._holder.param_groups[0]["params"]}
        return not any(
            issubclass(type(thing), torch.optim.Optimizer) and any(id(p) in mine for p in parameters_of(thing))
            for thing in gc.get_objects()
        )
