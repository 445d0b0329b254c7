"""Agreement: every process of a distributed run sees the same numbers, so that all roll back or none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Agreement"]


class Agreement:
    """Means and alarms over the processes of a group; without a process group, what this process sees.

    Args:
        process_group: None: all processes.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group

    @property
    def num_processes(self) -> int:
        """How many have to agree."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes; not finite where it was not in any of them."""
        if self.num_processes > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.process_group)
            values /= self.num_processes
        return values

    def any(self, alarm: bool, optimizer: torch.optim.Optimizer) -> bool:
        """Whether any process raises the alarm; asked on the device of the optimizer's first parameter."""
        if self.num_processes == 1:
            return alarm
        flag = torch.tensor(float(alarm), device=optimizer.param_groups[0]["params"][0].device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.process_group)
        return bool(flag)
