"""The gradient as a sum over its sources: samples, and terms of the loss."""

from .limits import RULES, Rule, RunningLimit
from .observe import SampleWatch
from .samples import SampleSplitter, StoodOut
from .terms import LeftOut, TermRow, TermSplitter

__all__ = [
    "RULES",
    "LeftOut",
    "Rule",
    "RunningLimit",
    "SampleSplitter",
    "SampleWatch",
    "StoodOut",
    "TermRow",
    "TermSplitter",
]
