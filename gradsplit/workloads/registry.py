"""The table of workloads: one row each; the command line and the tests read it."""

from __future__ import annotations

from gradsplit.workloads.deep_stack import DEEP_STACK
from gradsplit.workloads.detection import DETECTION
from gradsplit.workloads.recurrence import ADDING, TEMPORAL_ORDER
from gradsplit.workloads.stacks import PLAIN_STACK, RESIDUAL_STACK
from gradsplit.workloads.task import Workload
from gradsplit.workloads.text import GPT, LSTM

REGISTRY: dict[str, Workload] = {
    row.name: row for row in (DETECTION, GPT, LSTM, DEEP_STACK, RESIDUAL_STACK, PLAIN_STACK)
}


def workload(name: str) -> Workload:
    """The row of that name.

    Raises:
        ValueError: there is no such row; the text lists them.
    """
    if name not in REGISTRY:
        raise ValueError(f"workload({name!r}): expected one of {', '.join(sorted(REGISTRY))}. Pass one of them.")
    return REGISTRY[name]
