"""The table of findings: one row a kind; adding one is a file and a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import (
    dead_units,
    explosion,
    forward_explosion,
    head_share,
    hot_layer,
    long_step,
    missing_norm,
    no_signal,
    nonfinite,
    recurrence_gain,
    saturation,
    unstable_rate,
    vanishing,
)
from .evidence import Evidence
from .finding import Finding


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        name: as users read it.
        find: evidence -> findings.
        explodes: whether it says that something explodes.
        reads_broken: whether it can judge a net whose loss or signals are not finite.
    """

    name: str
    find: Callable[[Evidence], list[Finding]]
    explodes: bool = False
    reads_broken: bool = False


REGISTRY: tuple[Kind, ...] = (
    Kind("nonfinite", nonfinite.find, reads_broken=True),
    Kind("hot layer", hot_layer.find, explodes=True, reads_broken=True),
    Kind("forward explosion", forward_explosion.find, explodes=True, reads_broken=True),
    Kind("explosion", explosion.find, explodes=True),
    Kind("through time", recurrence_gain.find, explodes=True),
    Kind("head share", head_share.find),
    Kind("missing normalisation", missing_norm.find, reads_broken=True),
    Kind("long step", long_step.find, reads_broken=True),
    Kind("unstable rate", unstable_rate.find),
    Kind("dead units", dead_units.find),
    Kind("saturation", saturation.find),
    Kind("vanishing", vanishing.find),
    Kind("no signal", no_signal.find),
)

EXPLODING = frozenset({"hot layer", "forward explosion", "explosion", "explosion through time"})
"""Kinds of findings that say that something explodes; a healthy net must have none of them."""
