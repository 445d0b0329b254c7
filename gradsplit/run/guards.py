"""`gradsplit run --guard`: one guard an optimizer, looking at the losses that backward was called on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..guard import DivergenceError, Guard
from ..record import GuardAction
from .tensors import TensorsOf

__all__ = ["Guards"]


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
