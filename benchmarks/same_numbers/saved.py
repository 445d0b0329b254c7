"""Checkpoints, states and run files that one tree writes and another loads, to go on from there."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradsplit as gs
from same_numbers import run_files, signals
from same_numbers.gso import make_gso, note_state
from same_numbers.nets import Faults, make_net, train
from same_numbers.optimizers import BUDGETS as OF_GSO
from same_numbers.sheet import Notes, Sheet
from same_numbers.splitters import BUDGETS, PLANS, calibrate, energies

FORMATS = ("torch", "safetensors")
SPLITTERS: dict[str, dict[str, Any]] = {
    **{name: {"plan": "xsp", "budget": BUDGETS[name]} for name in ("default", "ema", "zscore", "percentile", "three")},
    "lbf": {"plan": "lbf", "budget": BUDGETS["ema"]},
    "levels": {"plan": PLANS["tree_sp parts"], "budget": BUDGETS["every level"]},
    "columns": {"plan": PLANS["xsp axis=1 parts=3"], "budget": BUDGETS["three levels"]},
    "capped": {"plan": "xsp", "budget": None, "cap_updates": True},
    "eager": {"plan": "xsp", "budget": BUDGETS["ema"], "backend": "eager"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "default": {},
    "bin": {"second_moment": "bin", "budget": OF_GSO["ema"]},
    "levels": {"budget": OF_GSO["tensor and root"], "rule": "nearest"},
    "modules": {"plan": PLANS["tree_sp rows"], "budget": {"module": OF_GSO["zscore"], "bin": OF_GSO["relative"]}},
    "lbf": {"plan": lambda layout: gs.lbf(layout, energies(), max_bins=30), "second_moment": "bin"},
    "in_backward": {"in_backward": True, "budget": OF_GSO["ema"]},
    **{f"cyclic, {order}": {"schedule": "cyclic", "switch_every": 2, "order": order} for order in ("random", "energy")},
    "capturable": {"capturable": True},
    "eager": {"backend": "eager", "second_moment": "bin"},
}


class Loop:
    """A training whose every part is in its checkpoint: dropout, shuffled data, schedule, splitter, guard."""

    def __init__(self, make: Callable[[nn.Module], tuple[Any, Any]]) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer, splitter = make(self.model)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.97)
        self.guard = gs.Guard(self.model, self.optimizer, splitter, self.schedule, every=3, patience=2, history=16)
        draw = torch.Generator().manual_seed(5)
        data = torch.utils.data.TensorDataset(torch.randn(40, 4, generator=draw), torch.randn(40, 1, generator=draw))
        self.batches = self.guard.batches(torch.utils.data.DataLoader(data, batch_size=5, shuffle=True))

    def go_on(self, notes: Notes, steps: int) -> None:
        """Train; two losses in a row are lost, so that the guard goes back."""
        while steps:
            for x, y in self.batches:
                self.optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.model(x), y)
                loss = loss * (float("inf") if self.guard.step_count in (13, 14) else 1.0)
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.guard.step(loss)
                notes.note("losses", loss)
                steps -= 1
                if not steps:
                    break
        notes.note("parameters", self.model.state_dict())
        notes.note("schedule", self.schedule.state_dict()["last_epoch"])
        note_state(notes, self.optimizer)


def _with_splitter(notes: Notes, model: nn.Module, **options: Any) -> tuple[Any, Any]:
    kind = torch.optim.AdamW if options.get("cap_updates") else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.05)
    splitter = gs.GradientSplitter(model, optimizer=optimizer, sinks=[notes.record], **options)
    splitter.attach(optimizer)
    return optimizer, splitter


def part(sheet: Sheet, *, save: Path | None, load: Path | None) -> None:
    rows: dict[str, Callable[..., None]] = {"plans": plans, "chain": chain, "run files": runs}
    for name, options in SPLITTERS.items():
        rows[f"splitter/{name}"] = functools.partial(splitter_state, options=options)
        if name in ("default", "ema", "capped"):
            for form in FORMATS:
                make = functools.partial(_with_splitter, **options)
                rows[f"checkpoint/{form}/splitter {name}"] = functools.partial(checkpoint, make=make, form=form)
    for name, options in OPTIMIZERS.items():
        rows[f"gso/{name}"] = functools.partial(optimizer_state, options=options)
        own = {"bin": {"budget": OF_GSO["ema"], "second_moment": "bin"}, "cyclic, random": options, "default": {}}
        if name in own:
            for form in FORMATS:
                make = functools.partial(lambda notes, model, o: (make_gso(model, lr=0.02, **o), None), o=own[name])
                rows[f"checkpoint/{form}/gso {name}"] = functools.partial(checkpoint, make=make, form=form)
    if importlib.util.find_spec("optax") is not None:
        rows["optax"] = optax_state
    if importlib.util.find_spec("keras") is not None:
        rows["keras"] = keras_file
    for name, row in rows.items():
        for way, folder in (("saved", save), ("loaded", load)):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                place = folder.resolve() / name.replace("/", "-").replace(", ", "-").replace(" ", "-")
                only = Sheet(sheet.only if way == "loaded" else None, sheet.values)
                only.run(f"{way}/{name}", functools.partial(row, place=place, load=way == "loaded"))
                if way == "loaded":
                    sheet.digests |= only.digests
                    sheet.texts |= only.texts


def checkpoint(notes: Notes, *, place: Path, load: bool, make: Any, form: str) -> None:
    loop = Loop(functools.partial(make, notes))
    if not load:
        loop.go_on(notes, 10)
        gs.save_checkpoint(place, format=form, **loop.guard.parts, note={"steps": 10, "list": [1, 2.5, "three", None]})
        return
    notes.note("rest", gs.load_checkpoint(place, **loop.guard.parts))
    loop.go_on(notes, 12)
    notes.note("actions", [{**action.to_dict(), "time": 0, "reason": ""} for action in loop.guard.actions])


def splitter_state(notes: Notes, *, place: Path, load: bool, options: dict[str, Any]) -> None:
    model = make_net()
    faults = Faults(model)
    optimizer, splitter = _with_splitter(notes, model, **options)
    if not load:
        if options["plan"] == "lbf":
            calibrate(splitter, model)
        train(notes, model, optimizer, steps=3, faults=faults)
        torch.save([model.state_dict(), optimizer.state_dict(), splitter.state_dict()], place)
        return
    for living, state in zip((model, optimizer, splitter), torch.load(place, weights_only=True), strict=True):
        living.load_state_dict(state)
    train(notes, model, optimizer, first=3, faults=faults)
    notes.note("state", splitter.state_dict(), splitter.plan.fingerprint)


def optimizer_state(notes: Notes, *, place: Path, load: bool, options: dict[str, Any]) -> None:
    model = make_net()
    faults = Faults(model)
    optimizer = make_gso(model, lr=0.02, **options)
    if not load:
        train(notes, model, optimizer, steps=3, faults=faults)
        torch.save([model.state_dict(), optimizer.state_dict()], place)
        return
    for living, state in zip((model, optimizer), torch.load(place, weights_only=True), strict=True):
        living.load_state_dict(state)
    train(notes, model, optimizer, first=3, faults=faults)
    note_state(notes, optimizer)


def plans(notes: Notes, *, place: Path, load: bool) -> None:
    layout = gs.layout_of(make_net())
    if not load:
        made = {name: make(layout).to_dict() for name, make in PLANS.items() if callable(make)}
        place.write_text(json.dumps(made), encoding="utf8")
        return
    for name, state in json.loads(place.read_text(encoding="utf8")).items():
        plan = gs.Plan.from_dict(state)
        model = make_net()
        splitter = gs.GradientSplitter(model, plan, gs.Fixed(0.1), sinks=[notes.record])
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        splitter.attach(optimizer)
        train(notes, model, optimizer, steps=2)
        notes.note(name, plan.fingerprint, plan.bin_K, plan.parents_N)


def chain(notes: Notes, *, place: Path, load: bool) -> None:
    model = signals.two_heads()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    splitter = gs.ChainSplitter(model)
    if load:
        splitter.load_state_dict(torch.load(place, weights_only=True))
    splitter.attach(optimizer)
    train(notes, model, optimizer, steps=4, loss=signals.loss_of_heads)
    if not load:
        torch.save(splitter.state_dict(), place)
    notes.note("rows", splitter.rows(), splitter.state_dict())
    splitter.remove()


def runs(notes: Notes, *, place: Path, load: bool) -> None:
    """Run files; they are copied, so that nothing is written beside the saved ones."""
    if not load:
        place.mkdir(exist_ok=True)
        for old in place.glob("*.db*"):
            old.unlink()
        for run in run_files.RUNS:
            run_files.make_run(run, place)
        return
    with tempfile.TemporaryDirectory() as folder:
        for run in run_files.RUNS:
            shutil.copy(place / f"{run}.db", folder)
            own = Notes(run)
            run_files.report(own, run, Path(folder))
            for what, text in own.texts.items():
                notes.text(f"{run}, {what.removesuffix(' (text)')}", text)
            run_files.content(own, Path(folder) / f"{run}.db")
            notes.note(run, {what: digest.hexdigest() for what, digest in own.digests.items() if "text" not in what})


def optax_state(notes: Notes, *, place: Path, load: bool) -> None:
    """The leaves of the state's tree, as any checkpoint library keeps them."""
    import jax
    import optax
    from jax import numpy as jnp

    from gradsplit.integrations.optax import gso, split_gradients
    from same_numbers.arrays import BUDGETS as OF_ARRAYS
    from same_numbers.arrays import gradients, tree, weights

    links = {
        "split": optax.chain(split_gradients("xsp", OF_ARRAYS["ema"]), optax.sgd(0.05, momentum=0.9)),
        "gso": gso(0.05, second_moment="bin"),
    }
    for name, optimizer in links.items():
        params, first = tree(weights()), 0
        state = optimizer.init(params)
        file = place.with_name(f"{place.name}-{name}.npz")
        if load:
            kept, first = np.load(file), 2
            held = [jnp.asarray(kept[str(i)]) for i in range(len(kept.files))]
            whole = jax.tree_util.tree_structure((params, state))
            params, state = jax.tree_util.tree_unflatten(whole, held)
        for step in range(first, first + 2):
            updates, state = optimizer.update(tree(gradients(step)), state, params)
            params = optax.apply_updates(params, updates)
        leaves = jax.tree_util.tree_leaves((params, state))
        if not load:
            np.savez(file, **{str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)})
        notes.note(name, leaves)


def keras_file(notes: Notes, *, place: Path, load: bool) -> None:
    """Whole models in Keras' own format, with plan, budgets, history and counts."""
    import keras

    from same_numbers import keras_runs

    for own in (False, True):
        file = place.with_name(f"{place.name}-{'gso' if own else 'split'}.keras")
        if not load:
            model = keras_runs.net(own)
            keras_runs.fit(notes, model, 0)
            model.save(file)
        else:
            keras_runs.fit(notes, keras.saving.load_model(file), 1)
