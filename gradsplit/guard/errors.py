"""What a guard raises when it has no remedy left."""

from __future__ import annotations

from collections.abc import Sequence

from ..record import GuardAction

__all__ = ["DivergenceError"]


class DivergenceError(RuntimeError):
    """Training diverged and no rollback is left; the weights are those of the last snapshot.

    Attributes:
        actions: everything that the guard did, oldest first; the last one is this stop.
    """

    def __init__(self, message: str, actions: Sequence[GuardAction] = ()) -> None:
        super().__init__(message)
        self.actions = tuple(actions)
