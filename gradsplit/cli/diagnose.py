"""`gradsplit diagnose`: what is wrong with the gradient of a net, in words, worst first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..chain.chain import Chain, chain_figure
from ..watch.report.html import Section, html_table, page, text
from .app import at_least, check_place, flag, option, say, write_file
from .arguments import problem_from

__all__ = ["diagnosis_page", "run"]


def diagnosis_page(found: Mapping[str, Any], chain: Chain, evidence: Mapping[str, Any]) -> str:
    """Return the page as text.

    Args:
        found: `Diagnosis.to_dict()`.
        chain: the factored gradient.
        evidence: where the numbers come from: name -> value, shown at the end.
    """
    rows = [
        [str(number), f"{entry['kind']}: {entry['sentence']}", entry["evidence"], entry["change"]]
        for number, entry in enumerate(found["findings"], 1)
    ]
    table = html_table(["", "finding", "how it is known", "what to change"], rows)
    nothing = text("Nothing was found.")
    notes = [text(f"Note: {note}.") for note in found["notes"]]
    sections = [
        Section("What is wrong", "Worst first.", [table if rows else nothing, *notes]),
        Section("The chain", "From the loss down: what each factor makes of the signal.", [chain_figure(chain)]),
    ]
    found_here = "1 finding" if len(rows) == 1 else f"{len(rows)} findings"
    lead = f"Loss {chain.loss:.4g} on one batch, {found_here}."
    return page("gradsplit: diagnosis", lead, sections, evidence)


_MODEL, _STEP, _SHOWN = "The model", "The step of an optimizer", "Results"  # groups of options
DEMOS = {"deep-stack": "deep-stack", "detection": "detection", "recurrence": "temporal-order"}


def run(
    problem: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function here, without arguments, that returns (model, loss_fn, batch), for example train:problem "
            "in train.py. loss_fn(model, batch) gives the loss.",
        ),
    ] = "",
    demo: Annotated[
        str, option("NAME", "An example in place of your model: deep-stack, detection or recurrence.", _MODEL, "none")
    ] = "",
    lr: Annotated[float | None, option("RATE", "Judge the first step at this rate.", _STEP, "no judgement")] = None,
    optimizer: Annotated[str, option("CLASS", "The class of torch.optim that makes the step.", _STEP)] = "SGD",
    ladder: Annotated[
        bool, flag("--ladder", "Also ask derivatives of high order how far each part may step. Needs --lr.", _STEP)
    ] = False,
    limit: Annotated[int, option("COUNT", "How many findings to show at most.", _SHOWN)] = 10,
    out: Annotated[Path | None, option("FILE", "Also write the findings, as JSON.", _SHOWN, "none")] = None,
    page: Annotated[Path | None, option("FILE", "Also write findings and figure, as HTML.", _SHOWN, "none")] = None,
) -> None:
    """Say in words what is wrong with a model, from one batch: where the gradient explodes, vanishes or breaks.

    Each finding comes with its evidence and what to change. Nothing is trained. It takes a few forward and backward
    passes, and some dozens with --ladder.

    Example: gradsplit diagnose --demo detection
    """
    if bool(problem) == bool(demo):
        raise ValueError(
            "gradsplit diagnose: expected either MODULE:FUNCTION or --demo, got both or none. Try --demo detection."
        )
    if demo and demo not in DEMOS:
        raise ValueError(f"gradsplit diagnose --demo {demo}: expected one of {', '.join(DEMOS)}.")
    if ladder and lr is None:
        raise ValueError(
            "gradsplit diagnose --ladder: expected --lr with it, the step to be judged. Try --ladder --lr 0.1."
        )
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"gradsplit diagnose --lr {lr:g}: expected a finite number > 0. Try --lr 0.1.")
    at_least(1, limit, "gradsplit diagnose --limit")
    check_place(out, "gradsplit diagnose --out")
    check_place(page, "gradsplit diagnose --page")
    import gradsplit as gs

    model, loss_fn, batch = problem_from(DEMOS[demo] if demo else problem, "gradsplit diagnose")
    judged = None if lr is None else _optimizer(optimizer, model, lr)
    diagnosis = gs.diagnose(model, loss_fn, batch, judged, ladder=ladder)
    say(diagnosis.text(limit))
    if out is not None:
        write_file(out, json.dumps(diagnosis.to_dict(), indent=1) + "\n")
    if page is not None:
        asked = {"problem": demo or problem, "ladder": ladder, "gradsplit": gs.__version__}
        if judged is not None:
            asked |= {"optimizer": optimizer, "learning rate": lr}
        write_file(page, diagnosis_page(diagnosis.to_dict(), diagnosis.chain, asked))
        typer.echo(f"the findings and the chain as a page: {page}")


def _optimizer(name: str, model: Any, lr: float) -> Any:
    import torch

    made = getattr(torch.optim, name, None)
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise ValueError(
            f"gradsplit diagnose --optimizer {name}: expected a class of torch.optim, such as SGD or AdamW."
        )
    build: Any = made  # the base class takes no lr
    return build([p for p in model.parameters() if p.requires_grad], lr=lr)
