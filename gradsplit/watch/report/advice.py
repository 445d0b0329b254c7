"""What to change after a run: each advice is a sentence and a command line."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...budget.registry import BUDGETS
from ...resume.actions import GuardAction
from .account import Account, StreamAccount
from .origin import Departure
from .samples import look_at

__all__ = ["Advice", "advice_of", "number", "ACTION_HEADINGS", "action_rows", "action_sentence"]

OFTEN = 0.5  # a budget that acts in a larger share of the steps is more than a guard against exceptions
SELDOM = 0.001
ENOUGH_ROWS = 50  # before a budget is called unused

# The number of each budget that grows when it is to bound less.
_WIDENED_BY = {"relative_step": "tau", "fixed": "limit", "relative": "factor", "ema": "ratio", "zscore": "z"}


class Advice(NamedTuple):
    """A sentence that says why, and a command line to try; empty where nothing is to be run."""

    reason: str
    command: str


def advice_of(account: Account) -> list[Advice]:
    """Return what the recording suggests, most important first; never empty."""
    found: list[Advice] = []
    controlled = [s for s in account.streams if s.stream.controlled]
    first = account.first
    if first is not None:
        (stream,) = [s for s in account.streams if s.stream.index == first.stream]
        held = next((use for use in stream.uses if use.name == first.tensor), None)
        if controlled and first.kind == "history" and held is not None and math.isfinite(first.norm):
            reason = f"{first.tensor} left its history at step {first.step} and was bounded"
            if math.isfinite(held.largest_after):
                reason += f": a norm of at most {number(held.largest_after)} was let through"
            found.append(Advice(f"{reason}.", ""))
        elif controlled and first.kind in ("history", "backward") and held is not None:
            found.append(Advice(f"{first.tensor} was not finite at step {first.step}; its bins were zeroed there.", ""))
        else:
            found += _after(account, first, stream)
        look = look_at(account.samples_at_first)
        if look:
            found.insert(0, Advice(look, ""))
    elif "exception" in account.meta:
        found.append(
            Advice("The script ended with an exception. The recording shows no explosion before it: look there.", "")
        )
    for stream in account.streams:
        if stream.outgrown[0] and first is None:
            rate = next((float(lr) for lr in stream.series.lr_R if lr > 0), 0.0)
            named = f" (now {rate:.3g})" if rate else ""
            reason = (
                f"Try a third of the learning rate of {stream.stream.optimizer}{named}, or a warm-up: the first steps"
            )
            found.append(Advice(f"{reason} made its matrices {stream.outgrown[1]:.3g} times as long.", ""))
        found += _own_bound(account, stream)
    for stream in controlled:
        found += _budget(account, stream)
    if not found:
        found.append(Advice("No norm left its history and no bound was in the way: nothing to change.", ""))
    return found


def _after(account: Account, first: Departure, stream: StreamAccount) -> list[Advice]:
    """What to try after an explosion that nothing held, by how it began."""
    rate = next(
        (float(lr) for lr in stream.series.lr_R[: 1 + stream.series.start_W[first.window]][::-1] if lr > 0), 0.0
    )
    named = f" (now {rate:.3g})" if rate else ""
    guard = Advice(
        "Let the guard go back and lower the rate when the run diverges; nothing in the script changes.",
        _command(account, "--guard"),
    )
    if first.kind in ("forward", "input", "loss", "backward", "loss_lost", "crash"):
        look = {
            "forward": "Look at the operation that is named: a logarithm or root of what can be 0, or a division.",
            "input": "Look for that batch in the data, or leave out its samples that are not finite.",
            "crash": f"Lower the learning rate{named}: the weights were lost before the forward pass failed.",
        }.get(
            first.kind, "Look at the last operations before the loss: a root or a norm at 0, a logarithm, a division."
        )
        return [
            Advice(f"{look} gradsplit diagnose says which module makes the first lost value.", ""),
            guard,
        ]
    if first.kind == "batch":
        told = "Look at that batch in the data: a scale, a unit or a file that is unlike the rest."
        bound = Advice(f"{told} A budget per row limits what such a batch can do.", _command(account, "--control"))
        return [bound, guard]
    lower = (
        f"Lower the learning rate{named}: try a tenth of it, or a warm-up over the first hundred steps. Or use "
        "gradsplit.GSO, which moves each row by a share of its own length and needs no rate. gradsplit diagnose says "
        "what is wrong with the model itself."
    )
    word = "left its history" if first.kind == "history" else "rose most"
    control = Advice(
        f"{'Everything' if first.tensor == 'all' else first.tensor} {word} at step {first.step}, and nothing bounded "
        "it. With a budget for every row, the rows that explode are scaled down, and all others train on as before.",
        _command(account, "--control"),
    )
    if any(len(stream.turns) for stream in account.streams if stream.stream.index == first.stream):
        lower = f"Lower the share{named}: 0.03 is the default. gradsplit diagnose says what is wrong with the model."
        control = Advice(
            f"{'Everything' if first.tensor == 'all' else first.tensor} {word} at step {first.step}. GSO bounded every "
            "row before its memory took it in: if the loss went on as before, nothing has to be changed.",
            "",
        )
    if first.kind == "weights":
        told = "Look for what writes to these weights beside the optimizer (a copy, an initialisation, an average)."
        return [Advice(told, ""), guard]
    lowered = Advice(
        f"{lower} The guard goes back and lowers the rate by itself when the run diverges.",
        _command(account, "--guard"),
    )
    if first.kind == "history" and first.rate_times < 2:
        return [control, lowered]
    if first.kind == "rate":
        raised = "Look for what raised the learning rate in one step (a schedule, a resume, a changed group). "
        return [Advice(raised + lowered.reason, lowered.command), control]
    return [lowered, control]


def _own_bound(account: Account, stream: StreamAccount) -> list[Advice]:
    """A clip that acts all the time is the step size of SGD. Under Adam it is not: there the factor cancels."""
    if stream.own_scaled < OFTEN or stream.stream.controlled or not stream.stream.optimizer.startswith("SGD"):
        return []
    return [
        Advice(
            f"The script's own clip_grad_norm_ scaled every gradient of {stream.stream.optimizer} on "
            f"{stream.own_scaled:.0%} of the steps, at the median by {stream.own_median:.3g}: it sets the step size "
            "there and couples all tensors to the largest. Take that line out of the script first; the command then "
            "bounds each row instead.",
            _command(account, "--control"),
        )
    ]


def _budget(account: Account, stream: StreamAccount) -> list[Advice]:
    uses = {use.name: use for use in stream.uses}
    if stream.scaled > OFTEN:
        return [
            Advice(
                f"The budget of {stream.stream.optimizer} is tight: {stream.scaled:.0%} of all bins were scaled on the "
                f"average step, and {stream.kept:.0%} of the gradient's length was kept at the median. If the loss "
                "falls too slowly, widen it.",
                _command(account, "--control", *_words(stream, 2.0)),
            )
        ]
    if stream.series.num_rows < ENOUGH_ROWS:
        return []
    tight = sorted((u for u in uses.values() if u.scaled > OFTEN and u.node), key=lambda u: -u.scaled)
    if tight:
        return [
            Advice(
                f"{len(tight)} nodes were scaled on most steps, {tight[0].name} on {tight[0].scaled:.0%}; the others "
                "hardly ever. This is what a bound per row is for. Widen it only if these parts learn too slowly.",
                _command(account, "--control", *_words(stream, 2.0)),
            )
        ]
    idle = stream.stream.about.get("words") == ["fixed:limit=inf"]  # in front of LBFGS: there is nothing to tighten
    if stream.scaled < SELDOM and not idle and not any(use.zeroed for use in uses.values()):
        return [
            Advice(
                f"The budget of {stream.stream.optimizer} was never used: {stream.scaled:.2%} of all bins were scaled. "
                "Leave it as a guard, which changes nothing while it is idle, or tighten it.",
                _command(account, "--control", *_words(stream, 0.5)),
            )
        ]
    return []


def _words(stream: StreamAccount, factor: float) -> list[str]:
    """Return ``--plan`` and ``--budget`` of the run with its numbers multiplied."""
    about = stream.stream.about
    words: list[str] = list(about.get("words") or []) or _default_words(str(about.get("budget", "")))
    made = []
    for word in words:
        level, at, rest = word.rpartition("@")
        name, *pairs = rest.split(":")
        options: dict[str, Any] = dict(pair.split("=") for pair in pairs)
        key = _WIDENED_BY.get(name)
        if key is not None:
            default = next((f.default for f in dataclasses.fields(BUDGETS[name]) if f.name == key), None)
            now = options.get(key, default if isinstance(default, float) else 1.0)
            options[key] = f"{float(now) * factor:g}"
        made += ["--budget", f"{level}{at}{':'.join([name, *(f'{k}={v}' for k, v in options.items())])}"]
    rule = ["--collective"] if about.get("collective") is True else []
    return [*(["--plan", str(about["strategy"])] if "strategy" in about else []), *made, *rule]


def _default_words(budget: str) -> list[str]:
    return [name for name, cls in BUDGETS.items() if f"{cls.__name__}(" in budget]


def _command(account: Account, *options: str) -> str:
    program = [str(word) for word in account.meta.get("argv", ["SCRIPT"])]
    return shlex.join(["gradsplit", "run", *options, *program])


def number(value: float) -> str:
    """Return a norm in three digits, "inf" or "nan" in words that say what they are.

    >>> number(1234567.0), number(float("nan")), number(0.25)
    ('1.23e+06', 'not finite', '0.25')
    """
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


ACTION_HEADINGS = ["after step", "what", "because", "loss", "usual loss", "undone", "batches left out", "rates ×"]


def action_rows(actions: Sequence[GuardAction]) -> list[list[str]]:
    """Return table rows, oldest first."""
    return [
        [
            str(action.step),
            f"back to step {action.to_step}" if action.kind == "rolled_back" else f"stopped at step {action.to_step}",
            action.reason,
            number(action.loss),
            number(action.usual),
            str(action.num_undone),
            action.batches or "–",
            f"{action.factor:g}",
        ]
        for action in actions
    ]


def action_sentence(actions: Sequence[GuardAction]) -> str:
    """Say in one sentence what the guard did."""
    undone = sum(action.num_undone for action in actions)
    back = sum(action.kind == "rolled_back" for action in actions)
    stopped = actions[-1].kind == "stopped"
    return (
        f"The guard rolled back {back} time{'s' if back != 1 else ''}"
        + (" and then stopped the run" if stopped else "")
        + f": {undone} updates undone, learning rates × {actions[-1].factor:g} since step {actions[-1].step}."
    )
