"""The backward chain: joints, the signal at them, its gains, and bounds on both (design.md 4.8)."""

from __future__ import annotations

from ..budget.running_median import RunningMedian
from .balance import Balanced, balance_
from .chain import Chain, Link, Recurrence
from .factors import factored_gradients, gradient_chain
from .gain_penalty import gain_penalty
from .joints import Joint, joints
from .recurrent import Unrolled, lyapunov_exponents
from .splitter import ChainSplitter

__all__ = [
    "Balanced",
    "Chain",
    "ChainSplitter",
    "RunningMedian",
    "Joint",
    "Link",
    "Recurrence",
    "Unrolled",
    "balance_",
    "factored_gradients",
    "gain_penalty",
    "gradient_chain",
    "joints",
    "lyapunov_exponents",
]
