"""gradsplit: split the gradient into parts and bound each by a budget of its own."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .moved import tell as _tell_what_moved

__version__ = "0.1.0"
_tell_what_moved()

if TYPE_CHECKING:
    from .budget import Budget as Budget
    from .budget import Decision as Decision
    from .budget import Ema as Ema
    from .budget import Fixed as Fixed
    from .budget import Outcome as Outcome
    from .budget import Percentile as Percentile
    from .budget import Relative as Relative
    from .budget import RelativeStep as RelativeStep
    from .budget import ZScore as ZScore
    from .budget import project as project
    from .chain import ChainSplitter as ChainSplitter
    from .chain import balance_ as balance_
    from .chain import gain_penalty as gain_penalty
    from .chain import gradient_chain as gradient_chain
    from .chain import joints as joints
    from .diagnose import diagnose as diagnose
    from .ladder import Ladder as Ladder
    from .ladder import taylor_ladder as taylor_ladder
    from .optim import GSO as GSO
    from .optim import CyclicBlocks as CyclicBlocks
    from .plan import Layout as Layout
    from .plan import Plan as Plan
    from .plan import layout_of as layout_of
    from .plan import lbf as lbf
    from .plan import per_tensor as per_tensor
    from .plan import tree_sp as tree_sp
    from .plan import whole as whole
    from .plan import xsp as xsp
    from .resume import Batches as Batches
    from .resume import CheckpointError as CheckpointError
    from .resume import DivergenceError as DivergenceError
    from .resume import Guard as Guard
    from .resume import load_checkpoint as load_checkpoint
    from .resume import save_checkpoint as save_checkpoint
    from .sources import SampleSplitter as SampleSplitter
    from .sources import TermSplitter as TermSplitter
    from .split import StepRecord as StepRecord
    from .splitter import GradientSplitter as GradientSplitter

_NAMES: dict[str, tuple[str, ...]] = {
    "plan": ("Layout", "Plan", "layout_of", "lbf", "per_tensor", "tree_sp", "whole", "xsp"),
    "budget": (
        *("Budget", "Decision", "Ema", "Fixed", "Outcome", "Percentile", "Relative", "RelativeStep", "ZScore"),
        "project",
    ),
    "split": ("StepRecord",),
    "splitter": ("GradientSplitter",),
    "optim": ("GSO", "CyclicBlocks"),
    "chain": ("ChainSplitter", "balance_", "gain_penalty", "gradient_chain", "joints"),
    "sources": ("SampleSplitter", "TermSplitter"),
    "diagnose": ("diagnose",),
    "ladder": ("Ladder", "taylor_ladder"),
    "resume": (
        *("Batches", "CheckpointError", "DivergenceError", "Guard"),
        *("load_checkpoint", "save_checkpoint"),
    ),
}
"""Module -> the public names it defines; a module is imported when one of its names is first used."""

_PLACES = {name: module for module, names in _NAMES.items() for name in names}

_ROOMS = ("budget", "chain", "functional", "integrations", "kernels", "ladder", "optim", "plan", "resume", "sources")
"""Packages that errors and pages name, as in ``gradsplit.chain.Unrolled``: imported when first used."""

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'gradsplit' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted(__all__)
