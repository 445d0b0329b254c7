"""The Keras adapters on the backend of the process: given gradients, training with accumulation, files of models."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

import gradsplit as gs
from gradsplit.integrations.keras import GSO, SplitCallback, split
from same_numbers.arrays import BUDGETS, OF_GSO, ROWS_IN_MODULES, SHAPES, STEPS, gradients, plan_for, weights
from same_numbers.sheet import Notes, Sheet

CASES: dict[str, Any] = {
    **{
        f"split/{word}": functools.partial(lambda b: split(sgd(), plan_for(b), b), budget)
        for word, budget in BUDGETS.items()
    },
    "split/default": lambda: split(sgd()),
    "split/nearest": lambda: split(sgd(), ROWS_IN_MODULES, BUDGETS["levels"], rule="nearest"),
    "split/named": lambda: split("adam", budget=BUDGETS["ema"], orientation={"*.conv.kernel": (-2, -1)}),
    "split/capped": lambda: split(keras.optimizers.AdamW(0.02), cap_updates=True),
    "split/capped, levels": lambda: split(
        keras.optimizers.Adam(0.02), budget={"root": gs.Fixed(2.0), "bin": gs.RelativeStep(0.02)}, cap_updates=True
    ),
    "split/accumulating": lambda: split(keras.optimizers.SGD(0.05, gradient_accumulation_steps=2), "xsp", "ema"),
    **{
        f"gso/{word}": functools.partial(lambda o: GSO(schedule(), plan_for(o.get("budget")), **of_keras(o)), options)
        for word, options in OF_GSO.items()
    },
}
ON_JAX = ("split/default", "split/levels", "split/capped", "gso/default", "gso/bin")
"""Operations are dispatched one by one there, which is slow."""


def schedule() -> Any:
    return keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.9)


def sgd() -> Any:
    return keras.optimizers.SGD(schedule(), momentum=0.9)


def of_keras(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "plan"}


def part(sheet: Sheet) -> None:
    backend = keras.backend.backend()
    for name, make in CASES.items():
        if backend != "jax" or name in ON_JAX:
            sheet.run(f"keras/{backend}/{name}", functools.partial(on_given, make=make))
    sheet.run(f"keras/{backend}/fit", fitted)
    sheet.run(f"keras/{backend}/fit, GSO", functools.partial(fitted, own=True))


def values(held: Any) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in held]


def on_given(notes: Notes, *, make: Any) -> None:
    optimizer = make()
    held = [keras.Variable(array, name=name) for name, array in zip(SHAPES, weights(), strict=True)]
    for step in range(STEPS):
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients(step)], held)
        notes.record(optimizer.split_report.record(step))
        notes.note("counts", optimizer.split_report.counts())
    notes.note("parameters", values(held))
    notes.note("state", values(optimizer.variables))
    config = optimizer.get_config()
    notes.note("configuration", {key: config[key] for key in ("plan", "budget", "rule", "orientation")})


def net(own: bool) -> Any:
    """A compiled model, with GSO or with a splitting SGD."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((6,), dtype="int32"), keras.layers.Embedding(7, 4, name="embed"),
        keras.layers.Conv1D(5, 3, name="conv"), keras.layers.LayerNormalization(name="norm"),
        keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3, name="fc"),
    ]  # fmt: skip
    model = keras.Sequential(layers, name="net")
    budget = {"root": gs.Fixed(0.5), "bin": (BUDGETS["ema"], gs.RelativeStep())}
    optimizer = GSO(schedule(), budget=budget) if own else split(sgd(), "xsp", budget)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fit(notes: Notes, model: Any, first: int, callbacks: list[Any] | None = None) -> None:
    draw = np.random.default_rng(first)
    x, y = draw.integers(0, 7, (24, 6)).astype("int32"), draw.integers(0, 3, 24).astype("int32")
    logs = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    notes.note("losses", logs.history)
    notes.note("parameters", values(model.weights))
    notes.note("state", values(model.optimizer.variables))


def fitted(notes: Notes, *, own: bool = False) -> None:
    """Trained, saved, loaded, and trained on."""
    model, callback = net(own), SplitCallback()
    fit(notes, model, 0, [callback])
    notes.note("worst", [tuple(row)[1:] for row in callback.worst()])
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "net.keras")
        loaded = keras.saving.load_model(Path(folder) / "net.keras")
    fit(notes, loaded, 1)
