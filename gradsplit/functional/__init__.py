"""Splitting as pure functions of arrays, written once for every framework: gradients and state in, both out again.

Nothing here imports a framework or keeps a value: what is known before the run (plan, patterns, constants) is fixed
when the functions are made, everything else passes through them, so they may run inside a compiled graph.
"""

from .adam import GsoRule, GsoState, gso_rule
from .arrays import Orientation, Oriented, Patterns, orientation_of
from .gso import GsoOptions
from .kinds import KINDS, ArrayKind, Choice, array_kinds
from .share import DEFAULT_OF_SHARE, ShareRule, ShareState, share_rule
from .splitting import Splitting, splitting

__all__ = [
    "DEFAULT_OF_SHARE",
    "KINDS",
    "ArrayKind",
    "Choice",
    "GsoOptions",
    "GsoRule",
    "GsoState",
    "Orientation",
    "Oriented",
    "Patterns",
    "ShareRule",
    "ShareState",
    "Splitting",
    "array_kinds",
    "gso_rule",
    "orientation_of",
    "share_rule",
    "splitting",
]
