"""What the recorder hands to sinks: rows on the host, one per decision, all of one stream.

Shape suffixes: _S one entry per row, _L one per leaf of the stream's outline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .outline import Outline

__all__ = ["Rows", "Stream", "Turns"]


@dataclass(frozen=True)
class Stream:
    """What one optimizer's rows are about.

    Attributes:
        index: 0, 1, … in the order in which optimizers stepped first.
        optimizer: the class's name.
        outline: the nodes that are recorded.
        controlled: whether gradients are bounded, or only measured.
        about: layout, plan, budget and the like, as plain data.
    """

    index: int
    optimizer: str
    outline: Outline
    controlled: bool = False
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Turns:
    """What GSO's steps did, read now and then; see `gradsplit.split.ShareRecord`.

    Attributes:
        stream: whose steps these are.
        step_K: the steps that were read.
        factor_K: by which the whole gradient was multiplied; below 1 where the batch was scaled as a whole.
        turned_KT: mean degrees by which a tensor's rows were turned away from their gradients; nan: not measured.
        limit_KT: share of a tensor's rows that stood at their growth limit.
        bounded_KT: share of a tensor's rows whose gradient was bounded.
    """

    stream: Stream
    step_K: np.ndarray
    factor_K: np.ndarray
    turned_KT: np.ndarray
    limit_KT: np.ndarray
    bounded_KT: np.ndarray

    def __len__(self) -> int:
        return len(self.step_K)


@dataclass
class Rows:
    """Some consecutive rows of one stream.

    Attributes:
        stream: whose rows these are.
        step_S: the optimizer's step; a step whose closure runs k times has k rows.
        time_S: seconds since the epoch.
        loss_S: sum of what backward was called on for this step; nan if not seen.
        lr_S: learning rate of the first parameter group.
        own_scale_S: the factor by which the script itself had scaled all gradients, 1 if it did not.
        skipped_S: the step was not made, because a gradient scaler found inf or nan.
        norm_SL: L2 norms as measured, before the script's own scaling and ours, gradient units.
        kept_SL: norm after ours / norm before it, in [0, 1]; None where nothing is controlled.
        scaled_SL: bins scaled per leaf; None where nothing is controlled.
        zeroed_SL: bins zeroed per leaf; None where nothing is controlled.
        given_S: root mean square of what the first layers were given, as a multiple of the first time. nan: not seen;
            inf: it was not finite; None: nobody looked.
    """

    stream: Stream
    step_S: np.ndarray
    time_S: np.ndarray
    loss_S: np.ndarray
    lr_S: np.ndarray
    own_scale_S: np.ndarray
    skipped_S: np.ndarray
    norm_SL: np.ndarray
    kept_SL: np.ndarray | None = None
    scaled_SL: np.ndarray | None = None
    zeroed_SL: np.ndarray | None = None
    given_S: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.step_S)

    @property
    def total_S(self) -> np.ndarray:
        """The norm of the whole gradient as measured, float64."""
        return np.sqrt((self.norm_SL.astype(np.float64) ** 2).sum(axis=1))

    def node_norms(self, nodes: Sequence[int]) -> np.ndarray:
        """Return the norms of some nodes of the outline as measured, (S, len(nodes)), float64."""
        squares = self.norm_SL.astype(np.float64) ** 2
        below = self.stream.outline.leaves_of_N
        return np.sqrt(np.stack([squares[:, below[node]].sum(axis=1) for node in nodes], axis=1))

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Return consecutive rows of one stream as one."""
        columns: dict[str, Any] = {}
        for column in fields(cls)[1:]:
            arrays = [getattr(part, column.name) for part in parts]
            columns[column.name] = None if arrays[0] is None else np.concatenate(arrays)
        return cls(parts[0].stream, **columns)
