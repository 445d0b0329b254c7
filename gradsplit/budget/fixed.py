"""Fixed: a constant limit."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from ..xp import Array
from .base import Budget, Line, Reading, State

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed(Budget):
    """A node keeps a norm of at most ``limit``, whatever its history.

        limit_b = limit

    With one bin over everything this is `torch.nn.utils.clip_grad_norm_` without its 1e-6 in the denominator. In trials
    a tuned limit helped against *persistent* explosions under SGD with momentum (detector .285 against .117 for a tuned
    global clip); under Adam it changed little. Limits of tensors or modules must be looser than their share of the
    parent's, or the parent never binds.

    Args:
        limit: gradient units; one number, or one per node of the level, shape (n,); inf = unbounded.

    Raises:
        ValueError: a negative or NaN limit.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_of
    >>> limits_of(Fixed(2.0), norm=np.array([1.0, 9.0]))
    array([2., 2.])
    """

    name: ClassVar[str] = "fixed"
    reads_norms: ClassVar[bool] = False
    limit: Any = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is None or isinstance(self.limit, (bool, str)):
            raise ValueError(
                f"Fixed(limit={self.limit!r}): expected a number, or one per node. Write for example Fixed(1.0), or "
                "Fixed(float('inf')) for no limit."
            )
        try:
            values = np.asarray(self.limit, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(
                f"Fixed(limit={self.limit!r}): expected a number, or one per node. Write for example Fixed(1.0)."
            ) from None
        self._check(
            "limit",
            values.ndim <= 1 and bool((values >= 0).all()),
            "limits >= 0, where inf means unbounded, for example 1.0",
        )
        object.__setattr__(self, "limit", float(values) if values.ndim == 0 else tuple(values.tolist()))

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        if isinstance(self.limit, float):
            return xp.full(reading.norm.shape[0], self.limit, reading.norm)
        return xp.asarray(self.limit, reading.norm)

    def line(self) -> Line | None:  # noqa: D102
        return Line(floor=self.limit) if isinstance(self.limit, float) else None

    def constant(self) -> Any:  # noqa: D102
        return self.limit

    def check(self, num: int) -> str:  # noqa: D102
        if isinstance(self.limit, float) or len(self.limit) == num:
            return ""
        return f"one limit, or one per node of that level, shape ({num},), got shape ({len(self.limit)},)"
