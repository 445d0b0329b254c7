"""The gradient as a sum over its sources: samples, and terms of the loss."""

from .limits import RULES, Rule, RunningLimit
from .samples import SampleSplitter, StoodOut

__all__ = ["RULES", "Rule", "RunningLimit", "SampleSplitter", "StoodOut"]
