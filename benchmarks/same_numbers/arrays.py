"""The functional core on numpy, torch and JAX, and the optax transformations, operation by operation and compiled.

Where only the compiled runs differ, XLA fused another graph; operation by operation the arithmetic itself is compared.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from typing import Any

import numpy as np
import torch

import gradsplit as gs
from gradsplit.functional import Oriented, gso_rule, orientation_of, splitting
from same_numbers.sheet import Notes, Sheet
from same_numbers.splitters import EMA, ZSCORE

SHAPES = {
    "stem.conv.kernel": (3, 3, 2, 4),
    "stem.embedding": (5, 3),
    "body.fc1.kernel": (5, 6),
    "body.fc1.bias": (6,),
    "scale": (),
}
"""Output units last, as JAX and Keras have them."""

STEPS = 5
ROWS_IN_MODULES = functools.partial(gs.tree_sp, inner="xsp")
BUDGETS: dict[str, Any] = {
    "fixed": gs.Fixed(0.5),
    "relative": gs.Relative(0.05),
    "relative_step": gs.RelativeStep(0.03, length=1.0),
    "ema": EMA,
    "zscore": ZSCORE,
    "percentile": gs.Percentile(0.5, eta=0.1),
    "levels": {"root": (ZSCORE, gs.Fixed(2.0)), "module": gs.Relative(0.1), "tensor": gs.Percentile(), "bin": EMA},
}
OF_GSO: dict[str, Any] = {
    "default": {},
    "bin": {"second_moment": "bin"},
    "levels": {"budget": {"root": (gs.RelativeStep(0.05), EMA), "module": gs.Relative(0.5), "bin": gs.RelativeStep()}},
    "no decay": {"weight_decay": 0.0, "budget": ZSCORE, "second_moment": "bin"},
}


def weights() -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [np.asarray(draw.standard_normal(shape), dtype=np.float32) for shape in SHAPES.values()]


def gradients(step: int) -> list[np.ndarray]:
    """One tensor explodes, one entry is NaN, one is 3e30."""
    draw = np.random.default_rng((2, step))
    made = []
    for shape in SHAPES.values():
        units = np.exp(draw.standard_normal(shape[-1:]))
        made.append(np.asarray(draw.standard_normal(shape) * units, dtype=np.float32))
    if step == 1:
        made[0][1, 1, 0, 2] = np.nan
    if step == 2:
        made[2] *= np.float32(1e4)
    if step == 3:
        made[2][3, 1] = np.float32(3e30)
    return made


def plan_for(budget: Any) -> Any:
    return ROWS_IN_MODULES if isinstance(budget, dict) else "xsp"


def part(sheet: Sheet) -> None:
    turns = {"numpy": np.asarray, "numpy, float64": lambda a: np.asarray(a, np.float64), "torch": torch.from_numpy}
    if importlib.util.find_spec("jax") is not None:
        from jax import numpy as jnp

        turns["jax"] = jnp.asarray
    for (name, turn), rule in itertools.product(turns.items(), ("bottom_up", "nearest")):
        for word, budget in BUDGETS.items():
            work = functools.partial(bounded, turn=turn, budget=budget, rule=rule)
            sheet.run(f"functional/splitting/{word}/{rule}/{name}", work)
        for word, options in OF_GSO.items():
            work = functools.partial(moved, turn=turn, rule=rule, options=options)
            sheet.run(f"functional/gso_rule/{word}/{rule}/{name}", work)
    if importlib.util.find_spec("optax") is not None:
        of_optax(sheet)


def oriented() -> Any:
    return Oriented.of(SHAPES, orientation_of("last", call="same_numbers"))


def made_plan(budget: Any, layout: Any) -> Any:
    return ROWS_IN_MODULES(layout) if isinstance(budget, dict) else gs.xsp(layout)


def bounded(notes: Notes, *, turn: Any, budget: Any, rule: str) -> None:
    arrays = oriented()
    rows = splitting(made_plan(budget, arrays.layout), budget, oriented=arrays, rule=rule)
    held = [turn(array) for array in weights()]
    history = rows.init(held)
    for step in range(STEPS):
        grown = [turn(gradient) for gradient in gradients(step)]
        made, history, decision = rows.update(grown, history, held, 0.9**step, 0.1)
        notes.note("bounded", made)
        notes.note("decision", decision.scale_B, decision.limit_N, decision.outcome_B, decision.norm_B)
    notes.note("history", history)


def moved(notes: Notes, *, turn: Any, rule: str, options: dict[str, Any]) -> None:
    arrays = oriented()
    step_of = gso_rule(made_plan(options.get("budget"), arrays.layout), oriented=arrays, rule=rule, **options)
    held = [turn(array) for array in weights()]
    state = step_of.init(held)
    for step in range(STEPS):
        grown = [turn(gradient) for gradient in gradients(step)]
        changes, state, decision = step_of.update(grown, state, held, 0.05 * 0.9**step, 0.9**step)
        held = [weight + change for weight, change in zip(held, changes, strict=True)]
        notes.note("decision", decision.scale_B, decision.limit_N, decision.outcome_B)
    notes.note("parameters", held)
    notes.note("state", tuple(state))


def of_optax(sheet: Sheet) -> None:
    import optax

    from gradsplit.integrations.optax import cap_updates, gso, split_gradients

    def rate(step: Any) -> Any:
        return 0.05 * 0.9**step

    def behind(link: Any) -> Any:
        return link, optax.chain(link, optax.sgd(rate, momentum=0.9))

    cases: dict[str, Any] = {}
    for word, budget in BUDGETS.items():
        cases[f"split/{word}"] = functools.partial(
            lambda b: behind(split_gradients(plan_for(b), b, learning_rate=rate, momentum=0.9)), budget
        )
    cases["split/default"] = lambda: behind(split_gradients(learning_rate=rate))
    cases["split/nearest"] = lambda: behind(split_gradients(ROWS_IN_MODULES, BUDGETS["levels"], rule="nearest"))
    cases["split/first"] = lambda: behind(split_gradients("xsp", EMA, orientation="first"))
    cases["split/named"] = lambda: behind(
        split_gradients("xsp", gs.Relative(0.05), orientation={"*.conv.kernel": (-2, -1), "body.*": 0})
    )
    for word, options in OF_GSO.items():
        others = {"plan": plan_for(options.get("budget"))} | options
        cases[f"gso/{word}"] = functools.partial(lambda o: (gso(rate, **o),) * 2, others)
    link = cap_updates(learning_rate=rate)
    cases["capped"] = lambda: (link, optax.chain(optax.adam(rate), link))
    for (name, make), compiled in itertools.product(cases.items(), (False, True)):
        if compiled or name in ("split/default", "split/ema", "split/levels", "gso/default", "gso/bin", "capped"):
            way = "compiled" if compiled else "by operation"
            sheet.run(f"optax/{name}/{way}", functools.partial(in_optax, make=make, compiled=compiled))


def tree(arrays: list[np.ndarray]) -> dict[str, Any]:
    """Arrays nested by their dotted names."""
    from jax import numpy as jnp

    made: dict[str, Any] = {}
    for name, array in zip(SHAPES, arrays, strict=True):
        *path, leaf = name.split(".")
        at = made
        for word in path:
            at = at.setdefault(word, {})
        at[leaf] = jnp.asarray(array)
    return made


def in_optax(notes: Notes, *, make: Any, compiled: bool) -> None:
    import jax
    import optax

    link, optimizer = make()
    params = tree(weights())
    state = optimizer.init(params)
    notes.note("plan", link.plan_of(params).fingerprint)
    update = jax.jit(optimizer.update) if compiled else optimizer.update
    for step in range(STEPS):
        updates, state = update(tree(gradients(step)), state, params)
        params = optax.apply_updates(params, updates)
        notes.record(link.record(state, params))
    notes.note("parameters", params)
    notes.note("state", jax.tree_util.tree_leaves(state))
