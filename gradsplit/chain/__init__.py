"""The backward chain: joints, the signal at them, its gains, and bounds on both (design.md 4.8)."""

from __future__ import annotations

from gradsplit.chain.balance import Balanced, balance_
from gradsplit.chain.chain import Chain, Link, Recurrence
from gradsplit.chain.factors import factored_gradients, gradient_chain
from gradsplit.chain.gain_penalty import gain_penalty
from gradsplit.chain.joints import Joint, joints
from gradsplit.chain.lyapunov import lyapunov_exponents
from gradsplit.chain.running_median import RunningMedian
from gradsplit.chain.splitter import ChainSplitter
from gradsplit.chain.unrolled import Unrolled

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
