"""Deprecations: modules that had another path, each with the path to import instead.

Nothing is imported under an old path. Python asks the finder of this module last, when no other
finder knows the module.
For an old path the finder raises one line that names the new path. All rows leave together, with version `REMOVED_IN`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

REMOVED_IN = "0.3.0"
"""The version without this module; from then on an old path is an ordinary `ModuleNotFoundError`."""

_WORKLOADS = (
    "adapters", "aerial", "control", "deep_stack", "detection", "detector", "diffusion", "digits", "experts", "fashion",
    "recurrence", "scenes", "sentences", "spoken", "stacks", "text",
)  # fmt: skip
_OF_THE_LAB = (
    "cells", "compare", "controls", "demo", "evidence", "methods", "optimizers", "registry", "sweep", "task", "train",
)  # fmt: skip

MOVED = {
    # Rooms that moved whole. A row below one of them says where a module went that did not keep its name.
    "workloads": "lab.workloads",
    "workloads.boxes": "lab.workloads.detector",
    "workloads.corpus": "lab.workloads.text",
    "workloads.files": "lab.workloads.aerial",
    "workloads.summary": "lab.compare",
    "workloads.tally": "lab.controls",
    "workloads.watch": "lab.train",
    **{f"workloads.{name}": f"lab.{name}" for name in _OF_THE_LAB},
    "record": "watch.record",
    "record.actions": "resume.actions",
    "record.buffer": "watch.record.sinks",
    "record.schema": "watch.record.run_file",
    "record.sound": "watch.record.checks",
    "record.step": "splitter",
    "record.thinning": "watch.record.codec",
    "report": "watch.report",
    "report.comparison": "lab.pages.comparison",
    "report.demo_page": "lab.pages.demo",
    "report.page": "watch.report.html",
    "report.rate_curve": "lab.pages.rate_curve",
    "report.run_account": "watch.report.account",
    "report.run_advice": "watch.report.advice",
    "report.run_figures": "watch.report.run_page",
    "report.run_text": "watch.report.text",
    "run": "watch.run",
    "run.arrival": "watch.run.on_import",
    "run.losses": "watch.run.patched",
    "run.measure": "watch.run.track",
    "run.own_bound": "watch.run.patched",
    "guard": "resume",
    "guard.errors": "resume.guard",
    "guard.loss_history": "resume.divergence",
    "checkpoint": "resume",
    "checkpoint.errors": "resume.plain",
    "checkpoint.safetensors_file": "resume.formats",
    "checkpoint.torch_file": "resume.formats",
    "cli.speed": "lab.speed",
    "cli.speed.layouts": "lab.speed.figures",
    "cli.comparison_tables": "lab.pages.tables",
    # Single modules.
    **{f"lab.{name}": f"lab.workloads.{name}" for name in _WORKLOADS},
    "attach": "hooks",
    "bounding": "split",
    "calibration": "splitter",
    "saved_state": "split",
    "thawed": "splitter",
    "plan.bands": "plan.lowering",
    "plan.baselines": "plan.slices",
    "plan.part": "plan.plan",
    "plan.xsp": "plan.slices",
    "budget.bottom_up": "budget.projection",
    "budget.deciding": "budget.decision",
    "budget.nearest": "budget.projection",
    "budget.project": "budget.projection",
    "kernels.registry": "kernels.kernel",
    "kernels.sharing": "kernels.numba_loops",
    "kernels.walkable": "kernels.addressable",
    "distributed.local_plan": "distributed.shards",
    "optim.fused_update": "optim.updates.numba_cpu",
    "optim.planned": "optim.parts",
    "optim.untraced": "hooks",
    "chain.bound": "chain.signal_limits",
    "chain.cut": "chain.factors",
    "chain.fork_limits": "chain.forks",
    "chain.fork_rule": "chain.forks",
    "chain.fork_watch": "chain.forks",
    "chain.gain_penalty": "chain.recurrent",
    "chain.lyapunov": "chain.recurrent",
    "chain.module_limits": "chain.chain_splitter",
    "chain.splitter": "chain.chain_splitter",
    "chain.structure": "chain.joints",
    "chain.through_time": "chain.recurrent",
    "chain.unrolled": "chain.recurrent",
    "chain.walk": "chain.graph",
    "diagnose.dead_units": "diagnose.activations",
    "diagnose.explosion": "diagnose.signals",
    "diagnose.forward_explosion": "diagnose.signals",
    "diagnose.head_share": "diagnose.signals",
    "diagnose.hot_layer": "diagnose.weights",
    "diagnose.long_step": "diagnose.steps",
    "diagnose.missing_norm": "diagnose.weights",
    "diagnose.next_update": "diagnose.step_trial",
    "diagnose.no_signal": "diagnose.signals",
    "diagnose.nonfinite": "diagnose.activations",
    "diagnose.recurrence_gain": "diagnose.signals",
    "diagnose.registry": "diagnose.diagnosis",
    "diagnose.saturation": "diagnose.activations",
    "diagnose.unstable_rate": "diagnose.steps",
    "diagnose.vanishing": "diagnose.signals",
    "ladder.cauchy": "ladder.series",
    "ladder.safe": "ladder.radius",
    "integrations.jsonl": "watch.loggers",
    "integrations.mlflow": "watch.loggers",
    "integrations.scalars": "watch.loggers",
    "integrations.sinks": "watch.loggers",
    "integrations.tensorboard": "watch.loggers",
    "integrations.wandb": "watch.loggers",
}
"""Old path -> new path, both below `gradsplit`."""


def new_path(old: str) -> str | None:
    """The path below gradsplit that replaces an old one; None where nothing moved.

    >>> new_path("guard"), new_path("workloads.train"), new_path("workloads.boxes"), new_path("plan")
    ('resume', 'lab.train', 'lab.workloads.detector', None)
    """
    if old in MOVED:
        return MOVED[old]
    room, _, rest = old.rpartition(".")
    return f"{MOVED[room]}.{rest}" if room in MOVED else None


def _line(old: str, new: str) -> str:
    """What the error says. Python imports a room before its modules, so the room's line tells of both."""
    renamed = [
        f"{path.rpartition('.')[2]} to gradsplit.{place}"
        for path, place in MOVED.items()
        if path.startswith(f"{old}.") and place != f"{new}.{path.rpartition('.')[2]}"
    ]
    also = f", and of its modules {', '.join(renamed)}" if renamed else ""
    return f"gradsplit.{old} has moved to gradsplit.{new}{also}: change the import."


class MovedFinder:
    """Raises for an old path; finds nothing."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Say where a module is now.

        Raises:
            ImportError: for a module of gradsplit that has another path now. It is not a ModuleNotFoundError,
                which `from gradsplit.integrations import wandb` would replace by a line without the new path.
        """
        top, _, old = name.partition(".")
        new = new_path(old) if top == __package__ else None
        if new is not None:
            raise ImportError(_line(old, new), name=name)


def tell() -> None:
    """Have Python ask the finder, after every other."""
    if MovedFinder not in sys.meta_path:
        sys.meta_path.append(MovedFinder)  # a class with find_spec is a finder, as PathFinder is
