"""The backward chain: joints, the signal at them, its gains, and bounds on both.

The gain of a factor is the norm of the signal that leaves it / the norm of the signal that enters it. What the forward
pass does to activations is always called the forward gain.
"""

from __future__ import annotations

from ..budget.running_median import RunningMedian
from .balance import Balanced, balance_
from .chain import Chain, Link, Recurrence
from .chain_splitter import ChainSplitter
from .factors import gradient_chain
from .joints import Joint, joints
from .recurrent import Unrolled, gain_penalty, lyapunov_exponents

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
    "gain_penalty",
    "gradient_chain",
    "joints",
    "lyapunov_exponents",
]
