"""The account of a run in sentences, for the terminal and as the first part of the page."""

from __future__ import annotations

import math
import time

import numpy as np

from .account import Account, NodeUse, StreamAccount
from .advice import action_sentence, advice_of, number
from .origin import Departure
from .samples import SAMPLE_GLOSSARY, inputs_sentences, samples_sentences

__all__ = [
    "GLOSSARY",
    "TURN_HEADINGS",
    "USE_HEADINGS",
    "printable",
    "findings",
    "headline",
    "report_text",
    "turn_rows",
    "use_rows",
]


def printable(text: str) -> str:
    r"""Return the text with everything a terminal would obey (colours, titles, the cursor) or hide shown as �.

    Line feeds stay.

    >>> printable("a\x1b[2Jb\nc")
    'a�[2Jb\nc'
    """
    return "".join(character if character == "\n" or character.isprintable() else "�" for character in text)


def headline(account: Account) -> str:
    """Say in one sentence what happened first."""
    first = account.first
    if first is None:
        return f"No norm left its own history in {account.num_rows} recorded steps."
    told = _event(first)
    return f"On rank {first.rank}: {told[0].lower()}{told[1:]}" if first.rank else told


def _event(first: Departure) -> str:
    step = f"At step {_step(first)}"
    why = f": {first.reason}" if first.reason else ""
    if first.kind == "crash":
        return f"The script crashed in the forward pass after step {first.step}, and weights were not finite then."
    if first.kind == "input":
        return f"{step} the batch itself had values that were not finite."
    if first.kind == "forward":
        return f"It began at step {_step(first)} in {_module(first.tensor)}: {first.reason}."
    if first.kind == "weights":
        return f"It began at step {_step(first)} in {first.tensor}: {first.reason}."
    if first.kind == "rate":
        return f"It began at step {_step(first)}: {first.reason}; {first.tensor} rose most."
    if first.kind == "batch":
        return f"{step} the batch was unlike those before it: {first.reason}, and {first.tensor} rose most."
    if first.tensor == "all":
        return (
            f"{step} everything was lost at once: no tensor's gradient was finite, so the loss itself, or what lies "
            f"above every tensor, was not{why}."
        )
    where = first.tensor
    if first.rows:
        where = f"{first.rows[0][0]}" + (f" and {len(first.rows) - 1} more blocks" if len(first.rows) > 1 else "")
    if not math.isfinite(first.norm):
        return f"It began at step {_step(first)} in {where}: the gradient was not finite{why and f';{why[1:]}'}."
    if first.kind == "growth":
        return f"From step {_step(first)} on {first.reason}; {where} grew most."
    if first.kind != "history":
        return f"{step} {first.reason}; {where} rose most."
    return (
        f"It began at step {_step(first)} in {where}: norm {number(first.norm)}, {number(first.times)} times its usual "
        f"{number(first.usual)}."
    )


def _module(tensor: str) -> str:
    """The module that owns a tensor."""
    return tensor.rpartition(".")[0] or tensor


RATE_ROSE = 5.0  # of the learning rate from which it is told

GLOSSARY: dict[str, str] = {
    "No norm left its own history": (
        "No tensor's gradient was far above its last 64 steps, and no rule without a history found anything."
    ),
    "It began at step … in …: norm …, … times its usual …": (
        "This tensor's gradient left its history first. The usual norm is the median of its last 64 steps. If "
        "several rose at one step, those that rose most count, and the last of them in the forward pass is named."
    ),
    "… the gradient was not finite": (
        "A value was inf or nan. It flows from the loss down, so the last lost tensor of the forward pass is named."
    ),
    "… its weights jumped": (
        "Between two readings this tensor's weights grew thirtyfold and alone. Something other than the optimizer "
        "wrote to them, or its rate for them is far too high."
    ),
    "… the forward pass made the first value that was not finite here": (
        "The loss was not finite. Of all tensors that backward would need, this module's result was the first lost one."
    ),
    "At step … the batch itself had values that were not finite": (
        "The first operation was given inf or nan. Look for that batch in the data; the guard can step over it."
    ),
    "At step … everything was lost at once": "The loss was not finite, so no single tensor can be blamed.",
    "… lost it in this module, the last one, or above it": (
        "The loss was finite and no gradient was: look at the last module and at the operations between it and the "
        "loss (a square root or a norm at 0, a logarithm, a division)."
    ),
    "It began at step …: the learning rate rose to … times its largest before": (
        "A schedule, or the script, raised the rate in one step, and losses or norms rose within twenty steps."
    ),
    "At step … the batch was unlike those before it": (
        "Its values, or its loss with weights and rate as before, were far above the batches before it. Look at that "
        "batch in the data; a budget or the guard lets the run go on."
    ),
    "At step … the norm of the whole gradient was … times that of the first step": (
        "More than 30 times the first step's norm, large beside the weights, and the loss was no better than at the "
        "start: an explosion, however early. A learning rate that is too high is the usual cause."
    ),
    "At step … the loss was … times that of the first step": (
        "More than 10 times the first loss, with a norm beyond 10 times the first one."
    ),
    "At step … the loss ended at … times its best": (
        "The loss settled above twice its start and its best, after the norm had risen tenfold: the run did not "
        "recover."
    ),
    "At step … the loss was not finite": "The loss was inf or nan.",
    "From step … on the norm of the whole gradient grew by … per step": (
        "A few per cent per step for fifty steps, while the loss did not fall: a slow explosion. No single step began "
        "it."
    ),
    "On rank …": "It was seen in that process's own batch or forward pass; the gradients of all ranks show it.",
    "The script crashed in the forward pass": (
        "An exception arose in a module, and weights were inf or nan by then. The update before it is the cause."
    ),
    "A gradient scaler skipped … steps first": (
        "With float16 an exploded gradient is inf until the scale is small enough; the steps until then belong to it."
    ),
    "The learning rate had risen to … times its usual": "A schedule, or the script, raised the rate just before.",
    "Within ten steps … other tensors left their history, too": "What the event did to the rest of the model.",
    "None of the … other tensors left its history": "The event stayed where it began.",
    "It was a single step": "One step later the norm was usual again: most often one bad batch.",
    "It was out in … of the next ten, too": "The tensor's norm did not return to its history at once.",
    "Loss: … in the step before": "The loss right before the event, and the largest one right after it.",
    "… some tensor was out of its history at … steps": "How often, over the whole run. Only the first is explained.",
    "… the script's own clip_grad_norm_ scaled all gradients": (
        "How often the script's own clip acted, and by which factor. Norms in this report were measured before it."
    ),
    "… the learning rate rose to … times its largest before at step …": (
        "A fact, and no fault by itself: it stands here where neither losses nor norms rose after it, or where "
        "something else came first."
    ),
    "… the batch of step … was … times as large as any before it": (
        "A fact, and no fault by itself: a normalisation or a saturated unit may take such a batch up without a trace "
        "in loss and gradient. Look for it in the data."
    ),
    "… its matrices had grown to … times their length by step …": (
        "The median over the weight matrices, within the first steps. Healthy runs stay below 2; from 4 on the first "
        "steps have replaced the initialisation, and a smaller rate often ends lower. It is advice, and no check fails."
    ),
    "… steps were not made, since a gradient scaler found inf or nan": (
        "Ordinary with float16: the scaler lowers its scale. It is a fault only where it never ends."
    ),
    "… of all bins were scaled on the average step": (
        "How often the budgets acted under control, and which share of the gradient they kept."
    ),
    "… each step was turned by … degrees from its gradient": (
        "How far GSO's step lies from the gradient, the median of all readings and tensors. 0 is straight down, 90 is "
        "across: there the step follows the momentum, and hardly this batch."
    ),
    "… of the rows of matrices stood at their growth limit": (
        "Rows that had grown to the larger of their first length and 3, at the last reading. They go on turning. Where "
        "most rows of a tensor stand there, its scale is what the loss wants to change."
    ),
    "… the batch was scaled as a whole": (
        "Readings in which most rows were beyond five times their recent norm, so that the whole gradient was divided."
    ),
    "To bound the file, … old rows were thinned": (
        "Old steps share windows now; the largest norm of each window is kept."
    ),
    "The script ended with …": "The exception that ended the script, as Python printed it.",
    "The recording has no end": "The script is still running, or it was killed.",
    "The guard rolled back": "The guard went back to a snapshot and lowered the learning rate (docs/guard.md).",
    **SAMPLE_GLOSSARY,
}
"""Sentence of the report -> what it means. A test says that every sentence is here, and the guide shows the same."""


def findings(account: Account) -> list[str]:
    """Say what was found, one sentence each."""
    said: list[str] = []
    first = account.first
    if first is not None:
        said += samples_sentences(account.samples_at_first)
        said += _aftermath(first)
    for stream in account.streams:
        said += inputs_sentences(stream.samples, account.samples_at_first)
    if account.actions:
        said.append(action_sentence(account.actions))
    for stream in account.streams:
        said += _stream(stream, several=len(account.streams) > 1)
    if account.thinnings:
        rows = sum(thinning["num_rows"] for thinning in account.thinnings if thinning["stride_before"] == 1)
        widest = max(thinning["stride_after"] for thinning in account.thinnings)
        said.append(
            f"To bound the file, {rows} old rows were thinned to windows of up to {widest}; every window keeps its "
            "largest norms."
        )
    if "exception" in account.meta:
        said.append(f"The script ended with {account.meta['exception']}.")
        crash = next((one for one in account.meta.get("remarks", []) if one.get("kind") == "crash"), None)
        if crash is not None:
            said.append(f"The exception arose in the module {crash.get('where')}, after step {crash.get('step')}.")
    elif "ended" not in account.meta:
        said.append("The recording has no end: the script is still running, or it was killed.")
    return said


def _aftermath(first: Departure) -> list[str]:
    said = []
    if first.skipped_before:
        said.append(
            f"A gradient scaler skipped {first.skipped_before} steps first, since the gradient was beyond its range; "
            f"the norm is that of step {first.step + first.skipped_before}."
        )
    if first.rate_times >= RATE_ROSE and first.kind != "rate":  # the first line has told it
        said.append(
            f"The learning rate had risen to {number(first.rate_times)} times its usual within ten steps before."
        )
    if first.neighbours and math.isfinite(first.norm):
        worst = ", ".join(
            f"{n.tensor} ({'lost' if not math.isfinite(n.times) else f'{number(n.times)} times its usual norm'}, "
            f"step {n.left_at})"
            for n in first.neighbours[:3]
        )
        said.append(
            f"Within ten steps {first.num_neighbours} of the {first.num_tensors - 1} other tensors left their history, "
            f"too: {worst}."
        )
    elif first.num_tensors > 1 and first.kind == "history" and math.isfinite(first.norm):
        said.append(f"None of the {first.num_tensors - 1} other tensors left its history within ten steps.")
    if first.tensor != "all" and first.kind == "history" and math.isfinite(first.norm):
        again = "It was a single step." if not first.lasting else f"It was out in {first.lasting} of the next ten, too."
        said.append(again)
    if math.isfinite(first.loss_before) and not math.isnan(first.loss_after):
        after = f"{number(first.loss_after)} at most" if math.isfinite(first.loss_after) else "not finite"
        said.append(f"Loss: {number(first.loss_before)} in the step before, {after} in this step and the ten after.")
    return said


def _stream(stream: StreamAccount, *, several: bool) -> list[str]:
    name = f"{stream.stream.optimizer} {stream.stream.index}" if several else stream.stream.optimizer
    said = []
    if len(stream.left_steps) > 1:
        steps = ", ".join(str(step) for step in stream.left_steps[:8])
        more = f" and {len(stream.left_steps) - 8} more" if len(stream.left_steps) > 8 else ""
        said.append(f"{name}: some tensor was out of its history at {len(stream.left_steps)} steps: {steps}{more}.")
    if stream.own_scaled:
        said.append(
            f"{name}: the script's own clip_grad_norm_ scaled all gradients on {stream.own_scaled:.1%} of steps, at "
            f"the median by {stream.own_median:.3g}. Norms here are from before it."
        )
    if stream.raised[1] and (stream.first is None or stream.first.kind != "rate"):
        said.append(
            f"{name}: the learning rate rose to {number(stream.raised[1])} times its largest before at step "
            f"{stream.raised[0]}."
        )
    if stream.larger[1] and not (stream.first is not None and stream.first.kind == "batch"):
        said.append(
            f"{name}: the batch of step {stream.larger[0]} was {number(stream.larger[1])} times as large as any before "
            "it, by the root mean square of what the first layer was given."
        )
    if stream.outgrown[0]:
        said.append(
            f"{name}: its matrices had grown to {number(stream.outgrown[1])} times their length by step "
            f"{stream.outgrown[0]}: the learning rate is large for them. The loss may fall all the same; compare a "
            "third of the rate."
        )
    skipped = int((stream.series.skipped_R != 0).sum())
    if skipped:
        said.append(f"{name}: {skipped} steps were not made, since a gradient scaler found inf or nan.")
    if stream.stream.controlled:
        zeroed = stream.uses[0].zeroed
        said.append(
            f"{name}: {stream.scaled:.1%} of all bins were scaled on the average step, {zeroed} zeroed in all; "
            f"{stream.kept:.1%} of the gradient's length was kept at the median."
        )
    return said + _turns(stream, name)


def _turns(stream: StreamAccount, name: str) -> list[str]:
    """What GSO's steps did."""
    turns, said = stream.turns, []
    known = turns.turned_KT[np.isfinite(turns.turned_KT)]
    if len(known):
        said.append(f"{name}: each step was turned by {np.median(known):.0f} degrees from its gradient at the median.")
    if len(turns):
        last_T = np.nan_to_num(turns.limit_KT[-1])
        if last_T.max(initial=0.0) > 0:
            most = list(stream.stream.about["names"])[int(last_T.argmax())]
            said.append(
                f"{name}: {last_T.max():.0%} of the rows of {most} stood at their growth limit at the last reading, "
                f"the most of {int((last_T > 0).sum())} tensors with such rows."
            )
        fired = int((turns.factor_K < 1).sum())
        if fired:
            said.append(f"{name}: the batch was scaled as a whole in {fired} of {len(turns)} steps that were read.")
    return said


TURN_HEADINGS = ["tensor", "turned by, degrees", "at the end", "rows at their limit", "at the end", "rows bounded"]


def turn_rows(stream: StreamAccount, most: int = 30) -> list[list[str]]:
    """Return table rows of what GSO did to each tensor, those turned furthest first."""
    turns, names = stream.turns, list(stream.stream.about.get("names") or ())
    with np.errstate(all="ignore"):
        usual_T = np.array([_middle(turns.turned_KT[:, t]) for t in range(len(names))])
    order = np.argsort(-np.nan_to_num(usual_T, nan=-1.0), kind="stable")[:most]
    percent = [[f"{_mean(table[:, t]):.1%}" for t in range(len(names))] for table in (turns.limit_KT, turns.bounded_KT)]
    return [
        [
            names[t],
            _degrees(usual_T[t]),
            _degrees(turns.turned_KT[-1, t]),
            percent[0][t],
            f"{np.nan_to_num(turns.limit_KT[-1, t]):.1%}",
            percent[1][t],
        ]
        for t in order.tolist()
    ]


def _middle(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def _degrees(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "–"


def use_rows(stream: StreamAccount, most: int = 15) -> list[list[str]]:
    """Return table rows of the most affected tensors: name, norms, how often scaled, how often zeroed."""
    outline = stream.stream.outline
    uses = [use for use in stream.uses if outline.levels_N[use.node] == "tensor"]

    def weight(use: NodeUse) -> tuple[float, float, float]:
        rise = use.largest / use.median if use.median > 0 else 0.0
        return (float(use.zeroed), use.scaled, rise)

    uses.sort(key=weight, reverse=True)
    return [
        [
            use.name,
            number(use.median),
            number(use.largest),
            str(use.largest_step),
            number(use.largest_after),
            f"{use.scaled:.1%}" if stream.stream.controlled else "–",
            str(use.zeroed) if stream.stream.controlled else "–",
        ]
        for use in uses[:most]
    ]


USE_HEADINGS = ["tensor", "usual norm", "largest", "at step", "largest after", "scaled", "zeroed"]


def report_text(account: Account) -> str:
    """The whole account as plain text."""
    meta = account.meta
    lines = [
        f"{account.path}: {' '.join(map(str, meta.get('argv', [])))} "
        f"({meta.get('mode', 'recorded')}, {account.num_rows} steps"
        + (f", {time.strftime('%Y-%m-%d %H:%M', time.localtime(meta['started']))}" if "started" in meta else "")
        + ")",
        "",
        headline(account),
        *findings(account),
    ]
    if account.actions:
        lines += ["", "What the guard did", *(f"  {action}" for action in account.actions)]
    for stream in account.streams:
        rows = [USE_HEADINGS, *use_rows(stream)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(USE_HEADINGS))]
        lines += ["", f"{stream.stream.optimizer}: tensors by what happened to them"]
        lines += [
            "  "
            + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
    lines += ["", "What to change"]
    for advice in advice_of(account):
        lines += [f"  {advice.reason}"] + ([f"    {advice.command}"] if advice.command else [])
    return printable("\n".join(lines))


def _step(first: Departure) -> str:
    return str(first.step) if first.step == first.last_step else f"{first.step} to {first.last_step}"
