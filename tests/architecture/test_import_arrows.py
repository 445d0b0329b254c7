"""Who may import whom: upwards never, sideways only where a line below says so."""

from __future__ import annotations

import pytest

from tests.architecture.sources import (
    Import,
    imports_in,
    imports_of,
    module_of,
    package_files,
    relative,
    unit_of,
)

# The house from the ground up: each storey may import the storeys below it, and its own neighbours only where named.
# A part of the package without a place here is an error: choose its storey.
STOREYS: tuple[set[str], ...] = (
    {"xp", "hooks", "amp", "moved", "collective", "series"},
    {"plan"},
    {"budget", "kernels", "rates"},
    {"distributed", "functional", "optimizers", "programs", "records"},
    {"split", "update_cap"},
    {"splitter", "optim", "ladder"},
    {"chain", "sources", "resume"},
    {"integrations", "diagnose"},
    {"watch"},
    {"lab"},
    {"cli"},
    {"__main__"},
)
NEIGHBOURS = {
    "update_cap": {"split"},  # a cap holds a Split
}
MAY_IMPORT: dict[str, set[str]] = {}
for _storey in STOREYS:
    _below = set(MAY_IMPORT)
    MAY_IMPORT |= {name: _below | NEIGHBOURS.get(name, set()) for name in _storey}
MAY_IMPORT["cli"] |= {"gradsplit"}
for _name in ("lab", "watch", "integrations"):
    MAY_IMPORT[_name] |= {"gradsplit"}  # the version; and like a user's script the lab may say `import gradsplit as gs`
MAY_IMPORT["gradsplit"] = set(MAY_IMPORT) - {"cli", "lab", "watch", "integrations"}

# Frameworks stay out of the parts that every framework shares; in xp each has one module, named after it.
FRAMEWORKS = {"torch", "jax", "tensorflow", "keras", "numba", "triton"}
_NEVER = {"load", "call"}
FRAMEWORK_FREE = {"plan": _NEVER, "budget": _NEVER, "functional": _NEVER, "xp": {"load"}}

# A heavy or optional package belongs to one layer, so that the others run without it.
OWNERS = {
    "numba": {"kernels", "optim", "lab", "cli"},
    "triton": {"kernels", "optim", "lab", "cli"},
    "typer": {"cli"},
    "rich": {"lab", "cli"},
    "plotly": {"chain", "watch", "lab", "cli"},
    "sklearn": {"lab"},
    "pycocotools": {"lab"},
    "PIL": {"lab"},
    "scipy": set(),
    "tensorflow": {"integrations", "xp"},
    "keras": {"integrations", "xp"},
    "jax": {"integrations", "xp"},
    "optax": {"integrations"},
    "accelerate": {"integrations"},
    "lightning": {"integrations"},
    "transformers": {"integrations"},
}

# The backends stand beside each other: what they share lives in a module that is not one of them.
BACKENDS = {"reference", "eager", "numba_cpu", "triton_gpu"}


def violations(module: str, imports: list[Import]) -> list[str]:
    """What the module imports and must not, one sentence each."""
    unit, found = unit_of(module), []
    if unit not in MAY_IMPORT:
        return [f"{module}: {unit!r} has no row in MAY_IMPORT; choose whom it may import"]
    for name, line, when in imports:
        place, top = f"{module}:{line}", name.split(".")[0]
        if top == "gradsplit":
            target = unit_of(name)
            if name.count(".") == 1 and target not in MAY_IMPORT:
                target = "gradsplit"  # `from gradsplit import xsp`: a public name, not a module
            if target != unit and target not in MAY_IMPORT[unit]:
                found.append(f"{place}: {unit} must not import {target} ({name})")
            parts = name.split(".")
            if unit == "kernels" and {module.split(".")[-1], *parts[2:3]} <= BACKENDS and not module.endswith(parts[2]):
                found.append(f"{place}: backends must not import each other ({name})")
        elif top in FRAMEWORKS and when in FRAMEWORK_FREE.get(unit, ()) and not module.endswith(f".{top}_xp"):
            found.append(f"{place}: {unit} must stay free of frameworks ({name})")
        elif when != "types" and unit not in OWNERS.get(top, {unit}):
            found.append(f"{place}: {top} belongs to {sorted(OWNERS[top])} ({name})")
    return found


@pytest.mark.parametrize("path", package_files(), ids=relative)
def test_every_module_imports_only_what_its_layer_may(path):
    found = violations(module_of(path), imports_in(path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "names"),
    [
        ("gradsplit.plan.slices", "import torch", "free of frameworks"),
        ("gradsplit.budget.ema", "def limit():\n    import jax.numpy", "free of frameworks"),
        ("gradsplit.xp", "import torch", "free of frameworks"),
        ("gradsplit.xp.numpy_xp", "import torch", "free of frameworks"),
        ("gradsplit.plan.slices", "from gradsplit.budget import Fixed", "must not import budget"),
        ("gradsplit.plan.slices", "from ..splitter import GradientSplitter", "must not import splitter"),
        (
            "gradsplit.kernels.eager",
            "def f():\n    from gradsplit.budget.fixed import Fixed",
            "must not import budget",
        ),
        ("gradsplit.kernels.numba_cpu", "from .reference import squares", "each other"),
        ("gradsplit.optim.gso", "from gradsplit.cli import main", "must not import cli"),
        (
            "gradsplit.splitter",
            "from gradsplit.lab.registry import REGISTRY",
            "must not import lab",
        ),
        ("gradsplit.splitter", "import gradsplit as gs", "must not import gradsplit"),
        ("gradsplit.splitter", "from gradsplit import xsp", "must not import gradsplit"),
        ("gradsplit.chain.joints", "from rich.table import Table", "belongs to"),
        ("gradsplit.misplaced.thing", "", "no row"),
    ],
)
def test_a_planted_arrow_is_caught(module, source, names):
    found = violations(module, list(imports_of(source, module)))
    assert len(found) == 1, found
    assert names in found[0], found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gradsplit.budget.projection", "from gradsplit.plan import Plan\nfrom ..xp import namespace_of"),
        (
            "gradsplit.plan.layout",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import nn",
        ),
        ("gradsplit.xp.torch_xp", "import torch"),
        ("gradsplit.xp", "def namespace():\n    import torch"),
        ("gradsplit.lab.workloads.text", "import gradsplit as gs\nfrom gradsplit import xsp"),
        ("gradsplit.kernels.eager", "from .lowering import rows"),
    ],
)
def test_a_permitted_arrow_passes(module, source):
    assert violations(module, list(imports_of(source, module))) == []
