"""Tasks on real data: examples, demonstrations, benchmarks and integration tests in one."""

from __future__ import annotations

from .registry import REGISTRY, workload
from .task import Batch, Expected, MissingDataError, Task, Workload

__all__ = ["REGISTRY", "Batch", "Expected", "MissingDataError", "Task", "Workload", "workload"]
