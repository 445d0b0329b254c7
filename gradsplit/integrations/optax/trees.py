"""Parameter trees as named arrays: dotted paths, and the layout with rows for output units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from ...functional import Oriented, orientation_of
from ...plan import Layout, Plan, make_plan
from ...plan.registry import strategy_named

__all__ = ["Leaves", "Planner", "energies_of", "layout_of", "leaves_of"]


class Leaves(NamedTuple):
    """A tree as a list of arrays, their dotted names, and the way back."""

    names: tuple[str, ...]
    arrays: list[Any]
    back: Callable[[list[Any]], Any]


def leaves_of(tree: Any, *, call: str) -> Leaves:
    """Flatten a tree; the name of a leaf is its path with dots, ``params.Dense_0.kernel``.

    Raises:
        TypeError: a leaf that is not an array of floating-point numbers.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path, _ in pairs)
    arrays = [jnp.asarray(leaf) for _, leaf in pairs]
    for name, array in zip(names, arrays, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            raise TypeError(
                f"{call}(…): expected floating-point parameters, got {array.dtype} at {name!r}. Leave it out of the "
                "tree, or wrap the transformation in optax.masked."
            )
    return Leaves(names, arrays, lambda leaves: jax.tree_util.tree_unflatten(structure, leaves))


def _oriented(leaves: Leaves, orientation: Any, call: str) -> Oriented:
    shapes = {name: tuple(array.shape) for name, array in zip(leaves.names, leaves.arrays, strict=True)}
    if not shapes:
        raise ValueError(f"{call}(…): expected a tree with parameters, got one without leaves.")
    return Oriented.of(shapes, orientation_of(orientation, call=call))


def layout_of(params: Any, *, orientation: Any = "last") -> Layout:
    """Return the layout of a parameter tree, on which plans are made: names are dotted paths, rows are output units.

    Args:
        params: a tree of arrays.
        orientation: see `split_gradients`.

    Raises:
        TypeError: a leaf that is not an array of floating-point numbers.
        ValueError: no leaves, an unknown orientation.

    >>> layout_of({"dense": {"kernel": jnp.zeros((3, 8)), "bias": jnp.zeros(8)}}).shapes
    ((8,), (8, 3))
    """
    return _oriented(leaves_of(params, call="layout_of"), orientation, "layout_of").layout


def energies_of(squares: Any, *, orientation: Any = "last") -> dict[str, np.ndarray]:
    """Return squared gradients by name, in the shapes of `layout_of`: what `gradsplit.lbf` cuts by.

    Args:
        squares: a tree of squared gradients, best a mean over some steps.
        orientation: see `split_gradients`.

    Raises:
        TypeError: a leaf that is not an array of floating-point numbers.
        ValueError: no leaves, an unknown orientation.

    >>> energies_of({"kernel": jnp.asarray([[1.0, 2.0]])})
    {'kernel': array([[1.],
           [2.]], dtype=float32)}
    """
    leaves = leaves_of(squares, call="energies_of")
    oriented = _oriented(leaves, orientation, "energies_of")
    return {name: oriented.turned(t, np.asarray(leaves.arrays[t])) for t, name in enumerate(leaves.names)}


class Planner:
    """The plan of a parameter tree, and what is made of it, once per set of names and shapes.

    Args:
        plan: a Plan, a strategy's name or a function layout -> plan.
        orientation: see `split_gradients`.
        make: (plan, oriented) -> what the transformation needs.
        call: the caller's name, for errors.

    Raises:
        ValueError: a strategy that needs energies, an unknown name.
    """

    def __init__(self, plan: Any, orientation: Any, make: Callable[[Plan, Oriented], Any], *, call: str) -> None:
        orientation_of(orientation, call=call)
        if isinstance(plan, str) and strategy_named(plan, call=f"{call}(plan={plan!r})").needs_energy:
            raise ValueError(
                f"{call}(plan={plan!r}): expected a strategy that cuts by shapes alone, got one that needs energies. "
                "Pass gradsplit.lbf(layout_of(params), energies_of(squares))."
            )
        self._plan, self._orientation, self._make, self.call = plan, orientation, make, call
        self._made: dict[Any, tuple[Plan, Any]] = {}

    @property
    def plans(self) -> list[Plan]:
        """The plans made so far."""
        return [plan for plan, _ in self._made.values()]

    def weights(self, params: Any, leaves: Leaves) -> list[Any]:
        """Return the arrays of the parameters, which must be those that the updates are of.

        Raises:
            ValueError: a tree of other paths.
        """
        held = leaves_of(params, call=self.call)
        if held.names != leaves.names:
            odd = sorted(set(held.names) ^ set(leaves.names)) or list(held.names)
            raise ValueError(
                f"{self.call}(…).update(updates, state, params): expected updates of all parameters and of no others, "
                f"got two trees that differ in {odd[0]!r}. Fill in zeros, or leave it out of both with optax.masked."
            )
        return held.arrays

    def of(self, leaves: Leaves) -> tuple[Plan, Any]:
        """Return the plan of flattened parameters and what was made of it."""
        key = leaves.names, tuple(tuple(array.shape) for array in leaves.arrays)
        if key not in self._made:
            oriented = _oriented(leaves, self._orientation, self.call)
            plan = make_plan(self._plan, oriented.layout, call=self.call)
            self._made[key] = plan, self._make(plan, oriented)
        return self._made[key]
