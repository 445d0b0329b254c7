"""The ranges of a guard's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_constants", "check_counts", "check_parts"]


def check_counts(**least: tuple[int, int]) -> None:
    """Check whole numbers against the least that each may be.

    Raises:
        ValueError: one is below it, or no whole number.
    """
    for name, (value, bound) in least.items():
        if not isinstance(value, int) or value < bound:
            raise ValueError(f"Guard({name}={value!r}): expected a whole number >= {bound}.")


def check_constants(score: float, lr_factor: float) -> None:
    """Check the numbers that need not be whole.

    Raises:
        ValueError: one is out of its range.
    """
    if not score > 0:
        raise ValueError(f"Guard(score={score!r}): expected a number above 0, for example 10.")
    if not 0 < lr_factor <= 1:
        raise ValueError(f"Guard(lr_factor={lr_factor!r}): expected a factor in (0, 1]; 1 leaves the rate alone.")


def check_parts(parts: Mapping[str, Any]) -> None:
    """Check that every part has a state.

    Raises:
        ValueError: one has none, or the guard's own name.
    """
    for name, part in parts.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")) or name == "guard":
            raise ValueError(
                f"Guard({name}={type(part).__name__}): expected an object with state_dict() and load_state_dict(), "
                "under a name other than 'guard'."
            )
