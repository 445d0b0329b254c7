"""Random pieces of input: numbers at the edges, names that hurt, and damage done to a tree of plain values."""

from __future__ import annotations

import copy
import random
from typing import Any

__all__ = ["EDGES", "damaged", "name", "number", "shape"]

EDGES = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e-45, 1e-30, 1e30, 3e38, 1e300, float("inf"), float("-inf"), float("nan")),
    *(2.0**53, -(2.0**63), 0.999999, 1.000001),
)
_PIECES = (
    *("a", "weight", "bias", ".", "..", "[0:1]", "0", " ", "\n", "\0", "é", "行", "\u2028", "\ud800", "<b>", "'", '"'),
    *("%s", "{}", "{0}", "$", "/", "\\", "-", "--", "=", ":", "@", ",", "all", "\x1b[31m", "x" * 300),
)


def number(rng: random.Random) -> float:
    """An edge as often as an ordinary number of any size."""
    return rng.choice(EDGES) if rng.random() < 0.5 else rng.uniform(-1, 1) * 10.0 ** rng.randint(-6, 6)


def name(rng: random.Random) -> str:
    """A name: pieces, ordinary or hostile, or nothing."""
    return "".join(rng.choice(_PIECES) for _ in range(rng.randint(0, 4)))


def shape(rng: random.Random) -> tuple[Any, ...]:
    """A shape, now and then with a size that is none."""
    sizes: list[Any] = [rng.choice((1, 1, 2, 3, 5, 8, 0)) for _ in range(rng.randint(0, 4))]
    if sizes and rng.random() < 0.15:
        sizes[rng.randrange(len(sizes))] = rng.choice((-1, 2.5, True, None, "3", 10**30, float("nan")))
    return tuple(sizes)


def damaged(rng: random.Random, value: Any, *, times: int | None = None) -> Any:
    """A copy of nested mappings and lists in which some entries are lost, swapped, retyped or made absurd."""
    made = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4) if times is None else times):
        made = _damage(rng, made)
    return made


def _damage(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            del value[key]
        elif rng.random() < 0.1:
            value[rng.choice((name(rng), 7, None))] = value[key]
        else:
            value[key] = _damage(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            del value[at]
        elif kind < 0.25:
            value.insert(at, value[at])
        elif kind < 0.3:
            value.reverse()
        else:
            value[at] = _damage(rng, value[at])
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 1000, int(value) if abs(value) < 1e18 else 0))
    return rng.choice((None, "", name(rng), number(rng), -1, 2**62, 10**30, True, [], {}, [[]], {"a": 1}, b"\0", ()))
