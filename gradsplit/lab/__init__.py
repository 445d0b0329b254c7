"""The lab: workloads on real data, and the comparisons that train them. The command line alone imports it.

- `workloads`: what is trained, a file each; `registry` is their table, and `task` says what a workload is.
- Training one: `methods` are rows of `controls` and `optimizers`, and `train` runs one of them on one task.
- Comparing: `cells` of a grid, `sweep` over them in worker processes, `compare` with its summary, `demo`; `evidence`
  says where a number comes from.
- `pages`: what all of this looks like. `speed`: what a step costs.
"""

from __future__ import annotations

from .registry import REGISTRY, workload
from .task import Batch, Expected, MissingDataError, Task, Workload

__all__ = ["REGISTRY", "Batch", "Expected", "MissingDataError", "Task", "Workload", "workload"]
