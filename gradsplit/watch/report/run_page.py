"""The account of a run as one HTML page that works offline."""

from __future__ import annotations

import html
import platform
import time
from pathlib import Path
from typing import Any

from .account import ALONE, FACTOR, HISTORY, SCORE, Account, StreamAccount
from .advice import ACTION_HEADINGS, action_rows, advice_of, number
from .figures import COLUMNS, curves, heat_map
from .html import Section, html_table, page, text
from .text import USE_HEADINGS, findings, headline, use_rows

__all__ = ["run_page", "write_run_page"]

_TOLD = ("argv", "folder", "mode", "gradsplit", "torch", "python", "platform", "git_commit", "rank", "world_size")


def write_run_page(account: Account, path: str | Path) -> Path:
    """Write the page and return its path."""
    place = Path(path)
    place.write_text(run_page(account), encoding="utf8")
    return place


def run_page(account: Account) -> str:
    """Return the page as text."""
    program = " ".join(str(word) for word in account.meta.get("argv", [])) or Path(account.path).name
    sections = [
        Section("What happened", headline(account), [_sentences(findings(account))]),
        Section("What to change", "", [_advice(account)]),
    ]
    if account.actions:
        lead = (
            "Going back to a snapshot undoes updates; the rates of all later steps are multiplied by the last number."
        )
        sections.append(Section("The guard", lead, [html_table(ACTION_HEADINGS, action_rows(account.actions))]))
    for stream in account.streams:
        sections += _stream_sections(stream, several=len(account.streams) > 1)
    return page(f"gradsplit: {program}", _lead(account), sections, _evidence(account))


def _lead(account: Account) -> str:
    mode = {"watch": "gradients were measured and left as they were", "control": "gradients were bounded"}
    began = account.meta.get("started")
    when = f", begun {time.strftime('%Y-%m-%d %H:%M', time.localtime(began))}" if began else ""
    return f"{account.num_rows} steps recorded{when}; {mode.get(str(account.meta.get('mode')), 'recorded')}."


def _stream_sections(stream: StreamAccount, *, several: bool) -> list[Section]:
    name = f": {stream.stream.optimizer} {stream.stream.index}" if several else ""
    axis = "Norms as measured, before the script's own scaling and ours. The dashed line is the first departure."
    heat = (
        "Each recorded leaf down, steps across, at most "
        f"{COLUMNS} columns; a column shows the largest norm of its steps. Crosses: not finite. Drag to zoom, "
        "double-click to zoom out."
    )
    parts: list[Any] = [heat_map(stream)]
    if stream.first is not None and len(stream.series.start_W) > COLUMNS:
        parts += [text("The steps around the first departure, one a column:"), heat_map(stream, close=True)]
    return [
        Section(f"Norms and loss{name}", axis, [curves(stream)]),
        Section(f"Nodes and steps{name}", heat, parts),
        Section(f"Tensors{name}", "By what happened to them.", [html_table(USE_HEADINGS, use_rows(stream, 30))]),
        Section(f"Modules{name}", "Unfold a module to see its parts.", [_tree(stream)]),
    ]


def _sentences(said: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said) + "</ul>"


def _advice(account: Account) -> str:
    return "".join(
        text(advice.reason) + (f"<pre class=command>{html.escape(advice.command)}</pre>" if advice.command else "")
        for advice in advice_of(account)
    )


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
    for key in (
        "argv",
        "folder",
        "mode",
        "gradsplit",
        "torch",
        "python",
        "platform",
        "git_commit",
        "rank",
        "world_size",
    ):
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
    evidence["page made with"] = f"Python {platform.python_version()} on {platform.system()}"
    return evidence


_CSS = """
.tree{font-size:.92rem}.tree details,.tree .leaf{margin-left:18px}.tree>details{margin-left:0}
.tree summary{cursor:pointer}.tree .node{font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.tree .numbers{color:#555;margin-left:12px}
pre.command{background:#f2f4f7;border-radius:6px;padding:8px 12px;overflow-x:auto;margin:.2em 0 1em}
"""
