"""A plan as one rank sees it: the same bins and tree, the boxes cut to what the rank holds."""

from __future__ import annotations

import numpy as np

from ..plan import Boxes, Layout, Plan
from .shards import Shard

__all__ = ["LocalPlan", "pieces_of"]


def pieces_of(plan: Plan) -> tuple[Plan, np.ndarray | None]:
    """Return a plan in which every bin lies in one tensor, and the bin of each of its bins; None: it is the plan.

    Tensors of one bin may have different numbers of copies, as the weight and the bias of a row-wise parallel layer.
    """
    pairs, pieces = np.unique(np.stack((plan.bin_K, plan.tensor_K)), axis=1, return_inverse=True)
    if pairs.shape[1] == plan.num_bins:
        return plan, None
    columns = [*list(vars(plan.boxes).values())[:5], pieces.reshape(-1)]
    return Plan(plan.layout, Boxes.from_columns(*columns), modules=plan.modules), pairs[0]


class LocalPlan(Plan):
    """A plan over local shards: every kernel runs on it as on a whole one.

    Bins keep their global numbers; one that lies elsewhere has no box here and its sum is 0. So sums over ranks are
    sums over bins, and state per bin does not depend on the number of ranks.

    Args:
        plan: over the global shapes.
        shards: one a tensor.
    """

    def __init__(self, plan: Plan, shards: list[Shard]) -> None:
        boxes = plan.boxes
        corner = np.array([shard[1:] for shard in shards], dtype=np.int64)[boxes.tensor_K]
        top, bottom = np.maximum(boxes.row_start_K, corner[:, 0]), np.minimum(boxes.row_stop_K, corner[:, 1])
        left, right = np.maximum(boxes.col_start_K, corner[:, 2]), np.minimum(boxes.col_stop_K, corner[:, 3])
        held = (top < bottom) & (left < right)
        self.layout = Layout(plan.layout.names, tuple(shard.shape for shard in shards))
        self.boxes = Boxes.from_columns(
            boxes.tensor_K[held],
            (top - corner[:, 0])[held],
            (bottom - corner[:, 0])[held],
            (left - corner[:, 2])[held],
            (right - corner[:, 2])[held],
            boxes.bin_K[held],
        )
        self.modules, self.num_bins, self.tree = plan.modules, plan.num_bins, plan.tree
        self._prepared = {}

    def held_B(self, present_T: np.ndarray | None = None) -> np.ndarray:
        """Return how many elements of each bin this rank holds, (B,), of the tensors that are present."""
        weights = self.boxes.numel_K if present_T is None else self.boxes.numel_K * present_T[self.boxes.tensor_K]
        return np.bincount(self.boxes.bin_K, weights=weights, minlength=self.num_bins)
