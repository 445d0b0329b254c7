"""Directions: where a tensor goes, whatever the length of its step; one file and one row each.

A direction turns bounded gradients into a direction, with a memory of its own. How far each row then moves is decided
elsewhere, as a share of the row's length. `register` adds a direction from outside the package.
"""

from .adam import Adam
from .direction import Direction, Turn
from .orthogonal import Orthogonal, orthogonalised, product_dtype

__all__ = ["DIRECTIONS", "Adam", "Direction", "Orthogonal", "Turn", "orthogonalised", "product_dtype", "register"]

DIRECTIONS: dict[str, Direction] = {row.name: row for row in (Orthogonal(), Adam())}
"""The directions by name."""


def register(direction: Direction) -> Direction:
    """Add a direction, under its own name.

    Raises:
        ValueError: a name that is taken.

    >>> register(Adam())
    Traceback (most recent call last):
    ...
    ValueError: register(Adam()): expected a new name, got 'adam', which is taken. Give the direction another name.
    """
    if direction.name in DIRECTIONS or direction.name == "auto":
        raise ValueError(
            f"register({type(direction).__name__}()): expected a new name, got {direction.name!r}, which is taken. "
            "Give the direction another name."
        )
    DIRECTIONS[direction.name] = direction
    return direction
