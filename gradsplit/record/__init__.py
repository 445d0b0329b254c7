"""What a step leaves behind, and where it goes."""

from .step import BinReport, StepRecord

__all__ = ["BinReport", "StepRecord"]
