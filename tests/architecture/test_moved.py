"""An import of an old path fails with one line that names the new path."""

from __future__ import annotations

import ast
import importlib
import re
import sys

import pytest
from packaging.version import Version

import gradsplit
from gradsplit.moved import MOVED, REMOVED_IN, MovedFinder, new_path
from tests.architecture.sources import PACKAGE, module_of, package_files, relative, tracked

# What the README, the docs, the examples and the benchmarks imported or named before the rooms were built.
# Beside each old path stands a name that they took from it; the new path must define that name.
DOCUMENTED = {
    "workloads.boxes": "overlap",
    "workloads.cells": "Grid",
    "workloads.controls": "Split",
    "workloads.corpus": "load_corpus",
    "workloads.detection": "build_detection",
    "workloads.detector": "Detector",
    "workloads.evidence": "conditions",
    "workloads.methods": "METHODS",
    "workloads.optimizers": "make_optimizer",
    "workloads.recurrence": "TanhRNN",
    "workloads.registry": "REGISTRY",
    "workloads.scenes": "digit_scenes",
    "workloads.stacks": "build_plain_stack",
    "workloads.tally": "Tally",
    "workloads.task": "Task",
    "workloads.text": "build_gpt",
    "workloads.train": "train",
    "cli.speed.figures": "RATE",
    "cli.speed.layouts": "LAYOUTS",
    "cli.speed.pairs": "in_turn",
    "cli.speed.session": "measure",
    "record": "RunFile",
    "record.sound": "",
    "record.step": "StepRecord",
    "report.run_account": "account_of",
    "report.run_page": "run_page",
    "report.run_text": "report_text",
    "run": "launch",
    "run.session": "Session",
    "run.settings": "Settings",
    "guard": "Guard",
    "checkpoint": "save_checkpoint",
    "checkpoint.checkpoint": "read_tree",
    "saved_state": "",
    "plan.xsp": "xsp",
    "kernels.sharing": "",
    "distributed.local_plan": "",
    "optim.fused_update": "",
    "optim.untraced": "",
    "chain.fork_rule": "fork_limit",
    "chain.fork_watch": "",
    "chain.structure": "replace_tensors",
    "integrations.jsonl": "JsonLinesSink",
    "integrations.mlflow": "MlflowSink",
    "integrations.sinks": "SINKS",
    "integrations.tensorboard": "",
    "integrations.wandb": "WandbSink",
}

MODULES = {module_of(path): path for path in package_files()}


@pytest.mark.parametrize("old", sorted({*DOCUMENTED, *MOVED}))
def test_an_old_path_fails_with_one_line_that_names_the_new_one(old):
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"gradsplit.{old}")
    line = str(caught.value)
    assert "\n" not in line
    room = old.rpartition(".")[0]
    inside_a_moved_room = new_path(room) is not None and new_path(old) == f"{new_path(room)}.{old.rpartition('.')[2]}"
    assert f"gradsplit.{new_path(room) if inside_a_moved_room else new_path(old)}" in line


@pytest.mark.parametrize("old", sorted({*DOCUMENTED, *MOVED}))
def test_the_new_path_is_a_module_and_the_old_one_is_not(old):
    assert f"gradsplit.{new_path(old)}" in MODULES
    assert f"gradsplit.{old}" not in MODULES


@pytest.mark.parametrize(("old", "name"), [(old, name) for old, name in DOCUMENTED.items() if name])
def test_the_new_path_has_the_name_that_users_took_from_the_old_one(old, name):
    source = MODULES[f"gradsplit.{new_path(old)}"].read_text(encoding="utf8")
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    assert name in names or (PACKAGE / new_path(old).replace(".", "/") / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("statement", "place"),
    [
        ("from gradsplit.workloads.registry import REGISTRY", "gradsplit.lab"),
        ("from gradsplit import guard", "gradsplit.resume"),
        ("from gradsplit.integrations import wandb", "gradsplit.watch.loggers"),
        ("from gradsplit.report.page import page", "gradsplit.watch.report.html"),
    ],
)
def test_every_form_of_import_is_told(statement, place):
    with pytest.raises(ImportError, match=re.escape(place)):
        exec(statement, {})


@pytest.mark.parametrize("name", ["gradsplit.nothing", "gradsplit.plan.nothing", "workloads", "another.record"])
def test_what_never_was_ours_fails_as_ever(name):
    assert MovedFinder.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_every_other_finder_is_asked_first():
    ours = sys.meta_path.index(MovedFinder)
    built_in = [
        place for place, finder in enumerate(sys.meta_path) if finder.__module__.startswith("_frozen_importlib")
    ]
    assert ours > max(built_in)


def test_the_table_leaves_with_its_version():
    assert Version(gradsplit.__version__) < Version(REMOVED_IN), "remove gradsplit/moved.py and this file"


def test_nothing_in_the_repository_names_an_old_path():
    found = []
    for path in tracked(".md", ".py"):
        for dotted in set(re.findall(r"(?<![\w.])gradsplit\.([\w.]*\w)", path.read_text(encoding="utf8"))):
            parts = dotted.split(".")
            if any(new_path(".".join(parts[:end])) for end in range(1, len(parts) + 1)):
                found.append(f"{relative(path)}: gradsplit.{dotted}")
    here = "tests/architecture/test_moved.py"
    assert [line for line in found if not line.startswith((here, "gradsplit/moved.py"))] == []
    assert any(line.startswith(here) for line in found), "the search itself finds what this file names"
