"""What must hold of a state before any of it is taken over: states come from files, too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["check_state"]


def check_state(state: Any, keys: Iterable[str], *, call: str) -> list[float]:
    """Refuse a mapping without the keys, counts that are none and learning rates that are none.

    Args:
        state: what should have come from ``state_dict()``.
        keys: that must be in it; "step_count" and "top_lr" are looked at.
        call: the caller's name, for errors.

    Returns:
        The largest learning rates.

    Raises:
        ValueError: something else.

    >>> check_state({"step_count": 3, "top_lr": [0.1]}, ["step_count", "top_lr"], call="f")
    [0.1]
    """
    missing = sorted(set(keys) - set(state)) if isinstance(state, Mapping) else list(keys)
    if missing:
        what = "a mapping" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{call}: expected what state_dict() returned, got {what} without {missing}.")
    count = state.get("step_count", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{call}: expected a count of steps, got step_count={count!r}. The state is damaged.")
    tops = state["top_lr"]
    if not isinstance(tops, (list, tuple)) or not all(isinstance(top, float) and 0 < top < math.inf for top in tops):
        raise ValueError(f"{call}: expected learning rates > 0, got top_lr={tops!r:.80}. The state is damaged.")
    return list(tops)
