"""The account of a run as one HTML page that works offline.

Its pictures: norms and loss on one time axis, the heat map of nodes and steps, and a close-up of the first departure.
Shape suffixes: _C one entry per column of the picture, _L one per leaf.
"""

from __future__ import annotations

import html
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from .account import Account, StreamAccount
from .advice import ACTION_HEADINGS, action_rows, advice_of, number
from .html import Section, html_table, page, text
from .pictures import PICTURE_CSS, Line, courses, heat
from .rules import ALONE, FACTOR, GROWN, HISTORY, LOSS_TIMES, NORM_ALONE, NORM_TIMES, RATE_TIMES, SCORE, WEIGHT_TIMES
from .samples import SAMPLE_HEADINGS, sample_rows
from .text import GLOSSARY, TURN_HEADINGS, USE_HEADINGS, findings, headline, turn_rows, use_rows

__all__ = ["run_page", "write_run_page", "curves", "heat_map", "pooled"]

_TOLD = ("argv", "folder", "mode", "gradsplit", "torch", "python", "platform", "git_commit", "rank", "world_size")

COLUMNS = 600
CLOSE = 60  # windows on either side of the departure
CURVES = 6
# After Okabe and Ito: distinct for most colour-blind readers.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A")


def write_run_page(account: Account, path: str | Path) -> Path:
    """Write the page and return its path."""
    place = Path(path)
    place.write_text(run_page(account), encoding="utf8")
    return place


def run_page(account: Account) -> str:
    """Return the page as text."""
    words = [str(word) for word in account.meta.get("argv", [])]
    scripts = [word for word in words if word.endswith(".py")]
    script = (scripts or words[-1:] or [account.path])[0]
    sections = [
        Section(
            "What happened",
            headline(account),
            [_sentences(findings(account)), '<p><a href="#glossary">What these sentences mean</a></p>'],
        ),
        Section("What to change", "", [_advice(account)]),
    ]
    if account.actions:
        lead = (
            "Going back to a snapshot undoes updates; the rates of all later steps are multiplied by the last number."
        )
        sections.append(Section("The guard", lead, [html_table(ACTION_HEADINGS, action_rows(account.actions))]))
    for stream in account.streams:
        sections += _stream_sections(stream, several=len(account.streams) > 1)
    sections.append(Section("What the sentences mean", "", [_glossary()]))
    return page(f"gradsplit: {Path(script).name}", _lead(account), sections, _evidence(account))


def _lead(account: Account) -> str:
    mode = {"watch": "gradients were measured and left as they were", "control": "gradients were bounded"}
    began = account.meta.get("started")
    when = f", begun {time.strftime('%Y-%m-%d %H:%M', time.localtime(began))}" if began else ""
    return f"{account.num_rows} steps recorded{when}; {mode.get(str(account.meta.get('mode')), 'recorded')}."


def _stream_sections(stream: StreamAccount, *, several: bool) -> list[Section]:
    name = f": {stream.stream.optimizer} {stream.stream.index}" if several else ""
    axis = (
        "Norms as measured, before the script's own clip and before any bound of gradsplit. The dashed line stands "
        "where a norm first left its history."
    )
    heat = (
        f"Each line of the map is a recorded part of the model. Each of its at most {COLUMNS} columns is a step, or "
        "the largest norm of a few steps. Move over the map to read a name and a step."
    )
    parts: list[Any] = [heat_map(stream)]
    if stream.first is not None and len(stream.series.start_W) > COLUMNS:
        parts += [
            text("The steps around the first norm that left its history, one per column:"),
            heat_map(stream, close=True),
        ]
    gso = []
    if len(stream.turns):
        lead = (
            "The angle between GSO's step and the downhill direction (minus the gradient), in degrees: a mean over the "
            "rows of a tensor. Below it, how many rows stand at their growth limit. Only some steps were read."
        )
        rows = html_table(TURN_HEADINGS, turn_rows(stream, 15))
        gso = [Section(f"What GSO did{name}", lead, [turn_curves(stream), rows])]
    return [
        Section(f"Norms and loss{name}", axis, [curves(stream)]),
        *gso,
        *_samples(stream, name),
        Section(f"Parts and steps{name}", heat, parts),
        Section(
            f"Tensors{name}",
            "What happened to each tensor, the hardest hit first.",
            [html_table(USE_HEADINGS, use_rows(stream, 30))],
        ),
        Section(f"Modules{name}", "Unfold a module to see its parts.", [_tree(stream)]),
    ]


def _samples(stream: StreamAccount, name: str) -> list[Section]:
    rows = sample_rows(stream.samples)
    lead = (
        "Samples that stood out of their batch, at the steps whose samples were read. They are counted from 0 in the "
        "script's own batch, and backward passes from 0 in their step."
    )
    return [Section(f"Samples{name}", lead, [html_table(SAMPLE_HEADINGS, rows)])] if rows else []


def _sentences(said: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said) + "</ul>"


def _advice(account: Account) -> str:
    return "".join(
        text(advice.reason) + (f"<pre class=command>{html.escape(advice.command)}</pre>" if advice.command else "")
        for advice in advice_of(account)
    )


def _glossary() -> str:
    rows = (f"<li><span>{html.escape(said)}</span>: {html.escape(meaning)}</li>" for said, meaning in GLOSSARY.items())
    return f"<style>{PICTURE_CSS}.words span{{font-weight:600}}</style><ul id=glossary class=words>{''.join(rows)}</ul>"


def _tree(stream: StreamAccount) -> str:
    """Nested details elements: they unfold without any script."""
    outline = stream.stream.outline
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(outline.parents_N.tolist()):
        children.setdefault(parent, []).append(node)
    open_nodes = _path_to_first(stream)

    def line(node: int) -> str:
        use, parent = stream.uses[node], int(outline.parents_N[node])
        above = outline.names_N[parent] if parent > 0 else ""
        name = use.name.removeprefix(f"{above}.") if above else use.name
        rise = use.largest / use.median if use.median > 0 else float("nan")
        touched = f", scaled {use.scaled:.1%}, zeroed {use.zeroed}" if stream.stream.controlled else ""
        return (
            f'<span class="node">{html.escape(name)}</span><span class="numbers">usual {number(use.median)}, largest '
            f"{number(use.largest)} ({number(rise)} times) at step {use.largest_step}{touched}</span>"
        )

    def shown(node: int) -> str:
        below = children.get(node, [])
        if not below:
            return f'<div class="leaf">{line(node)}</div>'
        unfolded = " open" if node in open_nodes else ""
        return f"<details{unfolded}><summary>{line(node)}</summary>{''.join(map(shown, below))}</details>"

    return f'<style>{_CSS}</style><div class="tree">{shown(0)}</div>'


def _path_to_first(stream: StreamAccount) -> set[int]:
    """The root, and what lies above the tensor that left its history first."""
    outline, found = stream.stream.outline, {0}
    if stream.first is not None and stream.first.tensor in outline.names_N:
        node = outline.names_N.index(stream.first.tensor)
        while node >= 0:
            found.add(node)
            node = int(outline.parents_N[node])
    return found


def _evidence(account: Account) -> dict[str, Any]:
    meta = account.meta
    evidence: dict[str, Any] = {"run file": account.path}
    for key in _TOLD:
        if key in meta:
            evidence[key.replace("_", " ")] = meta[key]
    for stream in account.streams:
        about = stream.stream.about
        evidence[f"optimizer {stream.stream.index}"] = (
            f"{stream.stream.optimizer}, {about.get('num_parameters', 0):,} parameters, "
            f"{about.get('num_bins', 0)} bins, {stream.stream.outline.num_leaves} leaves recorded"
            + (f"; {about.get('strategy')}, {about.get('budget')}" if stream.stream.controlled else "")
        )
    evidence["change point"] = (
        f"over the {HISTORY} rows before, excess = ln norm − median and spread = max(1.4826 MAD, 0.25); a tensor "
        f"leaves its history alone (excess over its neighbours' above ln {ALONE:g} and 3 spreads) or with the whole "
        f"gradient (score {SCORE:g} and {FACTOR:g} times its largest)"
    )
    evidence["without a history"] = (
        f"the norm beyond {NORM_TIMES:g} times the first step's with a loss beyond three times its start, the loss "
        f"beyond {LOSS_TIMES:g} times its start with the norm, growth of {GROWN - 1:.0%} per step for fifty steps, "
        f"a tensor's weights beyond {WEIGHT_TIMES:g} times their length between two readings, alone, a norm beyond "
        f"{NORM_ALONE:g} times the largest before it, or a rate beyond {RATE_TIMES:g} times its largest before"
    )
    evidence["page made with"] = f"Python {platform.python_version()} on {platform.system()}"
    return evidence


_CSS = """
.tree{font-size:.92rem}.tree details,.tree .leaf{margin-left:18px}.tree>details{margin-left:0}
.tree summary{cursor:pointer}.tree .node{font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.tree .numbers{color:var(--soft);margin-left:12px}
pre.command{background:var(--page);border:1px solid var(--rule);border-radius:6px;padding:8px 12px;
white-space:pre-wrap;margin:.2em 0 1em}
@media(max-width:640px){.tree details,.tree .leaf{margin-left:8px}}
"""


def pooled(values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest finite value of each of at most ``columns`` equal runs along axis 0, and where they begin.

    >>> pooled(np.array([1.0, 5.0, 2.0, np.nan]), 2)[0].tolist()
    [5.0, 2.0]
    """
    starts = np.unique(np.arange(min(columns, len(values))) * len(values) // max(1, min(columns, len(values))))
    finite = np.where(np.isfinite(values), values, -np.inf)
    best = np.maximum.reduceat(finite, starts, axis=0)
    return np.where(np.isneginf(best), np.nan, best), starts


def curves(account: StreamAccount) -> str:
    """Norms of the whole gradient and of the top modules on a logarithmic axis, and the loss on an axis of its own."""
    series, outline = account.series, account.stream.outline
    lines = [Line("whole gradient", "currentColor", series.step_R, series.total_R.astype(np.float64))]
    nodes = outline.children(0)
    while len(nodes) == 1 and outline.children(nodes[0]):
        nodes = outline.children(nodes[0])
    ranked = sorted(nodes, key=lambda node: -account.uses[node].median if account.uses[node].median > 0 else 0.0)
    for node, colour in zip(ranked[:CURVES], COLOURS, strict=False):
        lines.append(Line(outline.names_N[node], colour, series.step_W, series.node_peak(node)))
    marked = None if account.first is None else float(account.first.step)
    made = courses("norm as measured, gradient units", lines, marked=marked, logarithmic=True)
    loss = series.loss_R.astype(np.float64)
    if np.isfinite(loss).any():
        made += courses("loss", [Line("loss", "#D55E00", series.step_R, loss)], marked=marked)
    return made


def turn_curves(account: StreamAccount) -> str:
    """By how much steps were turned, all tensors and those turned furthest; and the share of rows at their limit."""
    turns, names, made = account.turns, list(account.stream.about["names"]), ""
    half, orders = CURVES // 2, [np.argsort(-_levels(t), kind="stable") for t in (turns.limit_KT, turns.turned_KT)]
    shown = list(dict.fromkeys([*orders[0][:half].tolist(), *orders[1].tolist()]))[:CURVES]
    for title, table_KT in (
        ("turned by, degrees", turns.turned_KT.astype(np.float64)),
        ("rows at their growth limit, %", 100 * turns.limit_KT.astype(np.float64)),
    ):
        known = np.isfinite(table_KT)
        count_K = known.sum(axis=1)
        if not known.any() or not table_KT[known].any():
            continue
        mean_K = np.where(known, table_KT, 0.0).sum(axis=1) / np.maximum(count_K, 1)
        lines = [Line("mean over tensors", "currentColor", turns.step_K[count_K > 0], mean_K[count_K > 0])]
        for t, colour in zip(shown, COLOURS, strict=False):
            if known[:, t].any():
                lines.append(Line(names[t], colour, turns.step_K[known[:, t]], table_KT[known[:, t], t]))
        made += courses(title, lines, logarithmic=False)
    return made


def _levels(table_KT: np.ndarray) -> np.ndarray:
    """The mean of each tensor over the readings where it has a value, (T,)."""
    known = np.isfinite(table_KT)
    level_T: np.ndarray = np.where(known, table_KT, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return level_T


def heat_map(account: StreamAccount, *, close: bool = False) -> str:
    """Every recorded leaf (down) at every step (across): its norm over its own median, as a power of ten.

    Args:
        account: of one optimizer.
        close: only the windows around the departure, each on its own.
    """
    window = slice(None)
    if close and account.first is not None:
        window = slice(max(0, account.first.window - CLOSE), account.first.window + CLOSE)
    z_CL, at = _relative(account, window)
    bad_WL = (account.series.peak_bits_WL[window] & 0x7F80) == 0x7F80  # all exponent bits of a bfloat16: inf or nan
    lost_CL = np.maximum.reduceat(bad_WL, at, axis=0)
    identity = f"heat{account.stream.index}{'close' if close else ''}"
    return heat(z_CL, lost_CL, account.series.step_W[window][at], account.stream.outline.leaf_names, identity)


def _relative(account: StreamAccount, window: slice) -> tuple[np.ndarray, np.ndarray]:
    """(C, L) log10 of norm over the leaf's median, nan where it was 0 or not finite; and where columns begin."""
    series, columns, at = account.series, [], np.zeros(0, dtype=np.int64)
    usual = {use.node: use.median for use in account.uses}
    for leaf, node in enumerate(account.stream.outline.nodes_L.tolist()):
        best, at = pooled(series.peak(leaf)[window].astype(np.float64), COLUMNS)
        with np.errstate(divide="ignore", invalid="ignore"):
            column = np.log10(best / usual[node])
        columns.append(np.where(np.isfinite(column), column, np.nan))
    return np.stack(columns, axis=1), at
