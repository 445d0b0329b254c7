"""Layouts of any names and shapes, plans of every strategy over sound ones, plans read from damaged dicts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

import gradsplit as gs
from benchmarks.fuzz.draws import damaged, name, number, shape
from benchmarks.fuzz.verdict import outcome
from gradsplit.plan import STRATEGIES

__all__ = ["layouts", "plans", "sound_layout"]

_MOST = 4096  # elements of a layout that is planned


def layouts(rng: random.Random) -> str:
    """`Layout` of names and shapes that may be anything."""
    names = [name(rng) if rng.random() < 0.9 else rng.choice((None, 3, b"a")) for _ in range(rng.randint(0, 5))]
    shapes = [shape(rng) for _ in range(len(names) + rng.choice((0, 0, 0, 0, 1, -1)))]
    if rng.random() < 0.5:
        given = dict(zip(names, shapes, strict=False))
        kind, made = outcome(lambda: gs.Layout.from_shapes(given), what=repr(given))
    else:
        kind, made = outcome(lambda: gs.Layout(tuple(names), tuple(shapes)), what=repr((names, shapes)))
    if kind == "ok":
        assert made.num_elements == sum(made.numels) and len(made.rows) == len(made.cols) == len(made)
        assert len(made.fingerprint) == 16
    return kind


def sound_layout(rng: random.Random) -> gs.Layout:
    """A layout that is small and accepted."""
    dotted = ("a.weight", "a.bias", "b.0.weight", "b.0.bias", "b.1.weight", "head", "c.d.e.f", "<b>.é", "a.weight.x")
    names = rng.sample(dotted, rng.randint(1, len(dotted)))
    sizes = (1, 2, 3, 5, 7)
    return gs.Layout.from_shapes({n: tuple(rng.choice(sizes) for _ in range(rng.randint(0, 4))) for n in names})


def plans(rng: random.Random) -> str:
    """A plan of any strategy and options covers its layout exactly; a damaged dict of it is refused or as sound."""
    layout = sound_layout(rng)
    row = rng.choice(list(STRATEGIES.values()))
    if rng.random() < 0.5 and not row.needs_energy:
        made = row.make(layout)
    else:
        kind, made = outcome(lambda: _with_options(rng, layout), what=f"options of {layout}")
        if kind == "refused":
            return kind
    _check(made)
    state = damaged(rng, made.to_dict())
    kind, again = outcome(lambda: gs.Plan.from_dict(state), what=repr(state))
    if kind == "ok" and again.layout.num_elements <= _MOST:
        _check(again)
    return kind


def _with_options(rng: random.Random, layout: gs.Layout) -> gs.Plan:
    any_number: Any = rng.choice((None, 0, 1, 2, 3, 100, -1, 2.5, "2", True, number(rng)))
    choice = rng.randrange(4)
    if choice == 0:
        return gs.xsp(layout, parts=any_number, axis=rng.choice((0, 1, 2, -1, None, "0")))
    if choice == 1:
        return gs.lbf(layout, _energy(rng, layout), max_bins=any_number, min_gain=number(rng))
    if choice == 2:
        return gs.tree_sp(layout, inner=rng.choice((None, gs.xsp, gs.per_tensor, gs.whole)))
    return gs.lbf(layout, damaged(rng, _energy(rng, layout), times=1))


def _energy(rng: random.Random, layout: gs.Layout) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(rng.randrange(2**32))
    energy = {n: draw.exponential(size=s) * 10.0 ** draw.integers(-20, 20) for n, s in zip(layout.names, layout.shapes)}  # noqa: B905
    if rng.random() < 0.3:
        each = energy[rng.choice(list(energy))]
        each.reshape(-1)[rng.randrange(each.size)] = number(rng)
    return energy


def _check(plan: gs.Plan) -> None:
    """Every element is in exactly one bin, and names, nodes and description can be made."""
    covered = [np.zeros((r, c), dtype=int) for r, c in zip(plan.layout.rows, plan.layout.cols, strict=True)]
    for bin_ in plan.bins:
        assert bin_.name
        for box in bin_.boxes:
            at = plan.layout.names.index(box.tensor)
            covered[at][box.start[0] : box.stop[0], box.start[1] : box.stop[1]] += 1
    assert all((part == 1).all() for part in covered)
    assert len(list(plan.nodes)) == plan.num_nodes and plan.describe()
    assert (plan.parents_N[1:] < np.arange(1, plan.num_nodes)).all()
