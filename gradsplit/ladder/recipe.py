"""Recipes: sequences of the operators derivative, gradient, square and cube, run on signed-log numbers.

A recipe works on a function of the step, q(t), which is kept as one signed-log power series per bin. At the start it is
the loss, q(t) = L(theta + t d), and each operator turns it into the next:

| operator | q becomes | so its derivative's order |
|---|---|---|
| derivative | dq/dt, per unit of step | rises by one |
| gradient | dq/ds = (dq/dt) / ‖d‖, per unit of distance: the component along d of the gradient of q | rises by one |
| square | q(t)^2 | stays |
| cube | q(t)^3 | stays |

After each step q(0) is recorded. The orders that a recipe *says* (``order_in``, ``order_out``) are kept beside it as
labels. A square or a cube does not raise the order of differentiation, so ``order_true`` counts the differentiations
that were made. The true derivative of the said order stands beside each step for comparison.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from .signedlog import Floats, SignedLog, factorial_log

OPERATORS = ("derivative", "gradient", "square", "cube")
PRESETS = ("ladder-292",)


@dataclass(frozen=True)
class RecipeStep:
    """One row of a recipe.

    Args:
        operator: one of ``OPERATORS``.
        order_in: the order from which this step is said to start, if any.
        order_out: the order that it is said to yield, if any.
    """

    operator: str
    order_in: int | None = None
    order_out: int | None = None


@dataclass(frozen=True)
class Climb:
    """A recipe that has been run: S steps, B bins.

    Args:
        steps: the recipe.
        value: q(0) after each step, (S, B).
        order_true: differentiations so far, (S,).
        said: true derivative of the order that the step is said to yield, (S, B); nan where no order is said.
        float32: the same recipe in float32 arithmetic from the last differentiation on, (S, B).
        float64: the same in float64.
    """

    steps: tuple[RecipeStep, ...]
    value: SignedLog
    order_true: np.ndarray
    said: SignedLog
    float32: np.ndarray
    float64: np.ndarray

    def died_B(self, arithmetic: str) -> np.ndarray:
        """Return the first step, from 1, after which "float32" or "float64" holds a wrong 0, inf or nan; 0 if never."""
        held = getattr(self, arithmetic)
        dead = (~np.isfinite(held) | (held == 0)) & (self.value.sign != 0)
        return np.where(dead.any(axis=0), dead.argmax(axis=0) + 1, 0)


def recipe_of(recipe: str | Sequence[str | RecipeStep]) -> tuple[RecipeStep, ...]:
    """Return the steps of a preset, or of a sequence of operators.

    Raises:
        ValueError: an unknown preset or operator.

    >>> len(recipe_of("ladder-292"))
    292
    """
    if isinstance(recipe, str):
        if recipe not in PRESETS:
            raise ValueError(
                f"recipe={recipe!r}: expected one of {', '.join(PRESETS)} or a list of operators. "
                f'For a single operator write recipe=["{recipe}"].'
            )
        text = resources.files("gradsplit.ladder").joinpath(f"{recipe}.csv").read_text()
        rows = csv.DictReader(text.splitlines())
        return tuple(
            RecipeStep(row["operator"], *(int(row[c]) if row[c] else None for c in ("order_in", "order_out")))
            for row in rows
        )
    steps = tuple(step if isinstance(step, RecipeStep) else RecipeStep(step) for step in recipe)
    for place, step in enumerate(steps, start=1):
        if step.operator not in OPERATORS:
            raise ValueError(
                f"recipe: expected operators from {', '.join(OPERATORS)}, got {step.operator!r} at step {place}. "
                "Correct that entry."
            )
    return steps


def climb(recipe: str | Sequence[str | RecipeStep], coefficient: SignedLog, length_B: Floats) -> Climb:
    """Run a recipe on the ladders of some bins.

    Args:
        recipe: a preset's name or a sequence of operators.
        coefficient: Taylor coefficients of the loss along each direction, (K + 1, B).
        length_B: length of each direction, in units of the parameters.

    Raises:
        ValueError: an unknown operator, or more differentiations than the ladder has orders.

    >>> cubic = SignedLog.of(np.array([[2.0], [3.0], [0.0], [1.0]]))  # 2 + 3 t + t^3
    >>> climb(["derivative", "square", "cube"], cubic, np.ones(1)).value.to_float().ravel().round(9).tolist()
    [3.0, 9.0, 729.0]
    """
    steps = recipe_of(recipe)
    differentiations = [step.operator in ("derivative", "gradient") for step in steps]
    order = coefficient.log.shape[0] - 1
    if sum(differentiations) > order:
        raise ValueError(
            f"recipe with {sum(differentiations)} derivatives and gradients: expected at most the ladder's order, "
            f"{order}. Pass order={sum(differentiations)} or more."
        )
    quantity = coefficient
    values, singles, doubles = [], [], []
    for place, step in enumerate(steps):
        # Only orders that a later differentiation needs are kept.
        quantity = quantity[: sum(differentiations[place:]) + 1]
        if differentiations[place]:
            quantity = _derivative(quantity)
            if step.operator == "gradient":
                with np.errstate(divide="ignore"):
                    quantity = quantity.times_exp(-np.log(length_B))
            single, double = quantity[0].to_float(np.float32), quantity[0].to_float(np.float64)
        else:
            exponent = 2 if step.operator == "square" else 3
            if place == 0:
                single, double = quantity[0].to_float(np.float32), quantity[0].to_float(np.float64)
            quantity = _power(quantity, exponent)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                single, double = single**exponent, double**exponent
        values.append(quantity[0])
        singles.append(single)
        doubles.append(double)
    return Climb(
        steps=steps,
        value=SignedLog(np.stack([v.sign for v in values]), np.stack([v.log for v in values])),
        order_true=np.cumsum(differentiations),
        said=_true_derivatives([step.order_out for step in steps], coefficient),
        float32=np.stack(singles),
        float64=np.stack(doubles),
    )


def _derivative(q: SignedLog) -> SignedLog:
    k = np.arange(1, q.log.shape[0], dtype=np.float64)
    return q[1:].times_exp(np.log(k)[:, None])


def _power(q: SignedLog, exponent: int) -> SignedLog:
    if q.log.shape[0] == 1:
        return q**exponent
    out = q
    for _ in range(exponent - 1):
        out = _cauchy(out, q)
    return out


def _cauchy(a: SignedLog, b: SignedLog) -> SignedLog:
    orders = [(a[: k + 1] * b[: k + 1][::-1]).sum(axis=0) for k in range(a.log.shape[0])]
    return SignedLog(np.stack([v.sign for v in orders]), np.stack([v.log for v in orders]))


def _true_derivatives(orders: list[int | None], coefficient: SignedLog) -> SignedLog:
    """Return derivatives of the loss of these orders; nan where there is no order or the ladder ends below it."""
    derivative = coefficient.times_exp(factorial_log(coefficient.log.shape[0] - 1)[:, None])
    missing = np.full(coefficient.log.shape[1], np.nan)
    known = [k is not None and k < coefficient.log.shape[0] for k in orders]
    signs = [derivative.sign[k] if ok else missing for k, ok in zip(orders, known, strict=True)]
    logs = [derivative.log[k] if ok else missing for k, ok in zip(orders, known, strict=True)]
    return SignedLog(np.stack(signs), np.stack(logs))
