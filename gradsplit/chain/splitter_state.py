"""What a ChainSplitter shows and saves: the only place that copies its statistics to the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gradsplit.chain.fork_watch import ForkMemory, ForkWatch
from gradsplit.chain.signal_guard import JointMemory, SignalGuard


@dataclass(frozen=True)
class JointRow:
    """One joint, or one branch of a task fork, after the steps so far.

    Attributes:
        name: the joint; `fork->branch` for a branch.
        role: "layer" or "task".
        norm: L2 norm of the last signal before any bound.
        limit: the limit that the last signal met, inf for none.
        bounded: in how many backward passes the signal was scaled.
        nonfinite: in how many it was not finite.
    """

    name: str
    role: str
    norm: float
    limit: float
    bounded: int
    nonfinite: int


def rows_of(guard: SignalGuard, watch: ForkWatch) -> list[JointRow]:
    """All joints that have carried a signal, as host values."""
    rows = []
    for name, m in sorted(guard.memories.items()):
        bounded, nonfinite = int(m.bounded[0]), int(m.nonfinite[0])
        rows.append(JointRow(name, "layer", float(m.norm[0]), float(m.limit[0]), bounded, nonfinite))
    for fork in watch.memories:
        if not fork.maximum_K:
            continue
        limit = min((float(m) for m in fork.maximum_K if m > 0), default=math.inf)
        for k, branch in enumerate(fork.branches):
            name, counts = f"{fork.name}->{branch}", (int(fork.bounded_K[k]), int(fork.nonfinite_K[k]))
            rows.append(JointRow(name, "task", float(fork.norm_K[k]), limit, *counts))
    return rows


def dump_state(guard: SignalGuard, watch: ForkWatch) -> dict[str, Any]:
    """Everything that a continued run needs, as plain containers of tensors and numbers."""
    joints = {
        name: {
            "state": [torch.as_tensor(part) for part in m.state],
            **{key: torch.as_tensor(getattr(m, key)) for key in _SHOWN},
        }
        for name, m in guard.memories.items()
    }
    forks = [
        {
            "name": f.name,
            "branches": list(f.branches),
            **{key: [v.clone() for v in getattr(f, key)] for key in _LISTS},
        }
        for f in watch.memories
    ]
    return {"joints": joints, "forks": forks, "repeated": sorted(guard.repeated)}


def load_state(guard: SignalGuard, watch: ForkWatch, state: dict[str, Any]) -> None:
    """Undo `dump_state`.

    Raises:
        KeyError: the dictionary is not one of a ChainSplitter.
    """
    guard.memories = {
        name: JointMemory(tuple(entry["state"]), *(entry[key] for key in _SHOWN))
        for name, entry in state["joints"].items()
    }
    guard.repeated = set(state["repeated"])
    watch.memories = [
        ForkMemory(f["name"], tuple(f["branches"]), *(list(f[key]) for key in _LISTS)) for f in state["forks"]
    ]
    watch.forget_plan()


_SHOWN = ("norm", "limit", "bounded", "nonfinite")
_LISTS = ("maximum_K", "norm_K", "bounded_K", "nonfinite_K")
