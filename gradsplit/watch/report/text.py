"""The account of a run in sentences, for the terminal and as the first part of the page."""

from __future__ import annotations

import math
import time

from .account import Account, Departure, NodeUse, StreamAccount
from .advice import action_sentence, advice_of, number

__all__ = ["printable", "findings", "headline", "report_text", "use_rows"]


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
    if first.tensor == "all":
        return (
            f"At step {_step(first)} everything was lost at once: no tensor's gradient was finite, so the loss itself, "
            "or what lies above every tensor, was not."
        )
    where = first.tensor
    if first.rows:
        where = f"{first.rows[0][0]}" + (f" and {len(first.rows) - 1} more blocks" if len(first.rows) > 1 else "")
    if not math.isfinite(first.norm):
        return f"It began at step {_step(first)} in {where}: the gradient was not finite."
    return (
        f"It began at step {_step(first)} in {where}: norm {number(first.norm)}, {number(first.times)} times its usual "
        f"{number(first.usual)} (score {first.score:.1f})."
    )


def findings(account: Account) -> list[str]:
    """Say what was found, one sentence each."""
    said: list[str] = []
    first = account.first
    if first is not None:
        said += _aftermath(first)
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
    elif "ended" not in account.meta:
        said.append("The recording has no end: the script is still running, or it was killed.")
    return said


def _aftermath(first: Departure) -> list[str]:
    said = []
    if first.neighbours:
        worst = ", ".join(
            f"{n.tensor} ({'not finite' if not math.isfinite(n.times) else f'{number(n.times)} times its usual norm'}, "
            f"step {n.left_at})"
            for n in first.neighbours[:3]
        )
        said.append(
            f"Within ten steps {first.num_neighbours} of the {first.num_tensors - 1} other tensors left their history, "
            f"too: {worst}."
        )
    elif first.num_tensors > 1 and first.tensor != "all":
        said.append(f"None of the {first.num_tensors - 1} other tensors left its history within ten steps.")
    if first.tensor != "all":
        again = "It was a single step." if not first.lasting else f"It was out in {first.lasting} of the next ten, too."
        said.append(again)
    if math.isfinite(first.loss_before) and not math.isnan(first.loss_after):
        said.append(
            f"Loss: {number(first.loss_before)} before, at most {number(first.loss_after)} in the ten steps after."
        )
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
    skipped = int((stream.series.skipped_R != 0).sum())
    if skipped:
        said.append(f"{name}: {skipped} steps were not made, since a gradient scaler found inf or nan.")
    if stream.stream.controlled:
        zeroed = stream.uses[0].zeroed
        said.append(
            f"{name}: {stream.scaled:.1%} of all bins were scaled on the average step, {zeroed} zeroed in all; "
            f"{stream.kept:.1%} of the gradient's length was kept at the median."
        )
    return said


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


__all__ += ["USE_HEADINGS"]
