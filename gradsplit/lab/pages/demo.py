"""The page of the demonstration: tables, training loss, what was found in a photograph, norms before and after.

Its pictures are drawn by hand, as SVG and small bitmaps, so that the page stays far below a megabyte.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...watch.report.html import Section, html_table, page, text
from ...watch.report.pictures import PICTURE_CSS, Line, courses, heat
from .rate_curve import OTHERS, line_style
from .tables import number, verdict

__all__ = ["boxes_html", "demo_page"]

_NOTHING = 1e-12  # a norm of zero has no logarithm
TRUTH_COLOUR, FOUND_COLOUR = "#f7f7f7", "#ff8c00"


def demo_page(scenes: Sequence[Mapping[str, Any]], evidence: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        scenes: one per workload, from `gradsplit.lab.demo.collect`.
        evidence: where the numbers come from.
    """
    sections = [section for at, scene in enumerate(scenes) for section in _sections(scene, at)]
    lead = (
        "Every row has the same model, data, seed and number of steps. The other methods use the learning rate that "
        "was best in the trials named below each table; GSO uses its defaults. Methods that do not help are shown too."
    )
    return page("gradsplit demo", lead, sections, evidence).replace("</style>", f"{PICTURE_CSS}{_CSS}</style>", 1)


def _sections(scene: Mapping[str, Any], at: int) -> Iterable[Section]:
    name, way = scene["workload"], "higher is better" if scene["higher_is_better"] else "lower is better"
    yield Section(
        f"{name}: the table",
        f"{scene['title'][:1].upper()}{scene['title'][1:]}. {scene['expect']} {scene['steps']} steps; "
        f"{scene['metric']}: {way}. To target: steps until the training loss is where the global clip ends. Scaled: "
        "share of all bins over all steps. ms/step: processor time. Memory: optimizer bytes per weight byte.",
        [_table(scene), text("Where learning rates and limits come from: " + _choices(scene["rows"]))],
    )
    pictured = [row for row in scene["rows"] if row.get("example")]
    if pictured:
        yield Section(
            f"{name}: what each method found",
            "A piece of the photograph that was not used for training. White: the trees drawn by hand. Orange: the "
            "same number of found boxes, the most confident ones. A tree counts as hit if such a box overlaps it by "
            "more than half.",
            [boxes_html([(row["label"], row["example"]) for row in pictured], identity=f"photo{at}")],
        )
    yield Section(
        f"{name}: training loss",
        "Each point is the mean of a few steps. A bar along the top: not finite.",
        [_losses(scene)],
    )
    scaled = [row for row in scene["rows"] if row["norms"] and row["scaled_share"]]
    watched = next((row for row in scaled if row["ours"]), scaled[0] if scaled else None)
    if watched:
        yield Section(
            f"{name}: norms before and after, {watched['label']}",
            "Each line of a map is the whole gradient, a module or a tensor. The colour is its norm divided by its own "
            "median. The first map shows the norms after backward(), the second those that reached the optimizer.",
            [_norms(watched["norms"], part, f"norms{at}{part}") for part in ("before", "after")],
        )


def _table(scene: Mapping[str, Any]) -> str:
    metric = scene["metric"]
    headings = ["method", "rate", metric, "to target", "diverged", "scaled", "worst bin × mean scale",
                "ms/step", "memory"]  # fmt: skip
    rows = []
    for row in scene["rows"]:
        worst = row["worst"][0] if row["worst"] else None
        rows.append([
            row["label"],
            f"{row['lr']:g}" + ("" if row["strength"] is None else f", limit {row['strength']:g}"),
            number(row["score"]),
            "never" if row["steps_to_target"] is None else f"{row['steps_to_target']}",
            verdict(row),
            _percent(row["scaled_share"]),
            "" if worst is None else f"{worst[0]} × {worst[1]:.1g}",
            number(row.get("cpu_ms_a_step"), 1),
            number(row.get("state_per_weight"), 1),
        ])  # fmt: skip
    return html_table(headings, rows, bold=[at for at, row in enumerate(scene["rows"]) if row["ours"]])


def _choices(rows: Sequence[Mapping[str, Any]]) -> str:
    """What chose, each with its rows in brackets, in the order of the table."""
    chosen: dict[str, list[str]] = {}
    for row in rows:
        chosen.setdefault(row["chosen_by"], []).append(row["label"])
    return "; ".join(f"{source} ({' / '.join(labels)})" for source, labels in chosen.items()) + "."


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %" if share else "0"


def _losses(scene: Mapping[str, Any]) -> str:
    style = line_style([(row["label"], row["ours"]) for row in scene["rows"]])
    lines, kept = [], sorted(loss for row in scene["rows"] for loss in row["losses"] if loss is not None)
    most = (
        1e4 * abs(kept[len(kept) // 2]) if kept else 0.0
    )  # a run that explodes must not press all others into one line
    for row in scene["rows"]:
        stride = row["steps_run"] / max(len(row["losses"]), 1)
        y = np.array([np.nan if loss is None or loss > most else loss for loss in row["losses"]])
        colour = style[row["label"]][0]
        readable = "currentColor" if colour == OTHERS[0] else colour  # nearly black is lost on a dark screen
        lines.append(Line(row["label"], readable, np.arange(1, len(y) + 1) * stride, y))
    return courses("training loss", lines)


def _norms(norms: Mapping[str, Any], part: str, identity: str) -> str:
    """One heat map; None in the lists stands for a norm that was not finite."""
    before, shown = (
        np.array([[np.nan if v is None else v for v in line] for line in norms[name]], dtype=np.float64)
        for name in ("before", part)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        usual = np.array([np.median(column[np.isfinite(column)]) if np.isfinite(column).any() else 1.0
                          for column in before.T])  # fmt: skip
        powers = np.log10(np.maximum(shown, _NOTHING) / np.maximum(usual, _NOTHING))
    names = [_indented(name, level) for name, level in zip(norms["names"], norms["levels"], strict=True)]
    made = heat(powers, ~np.isfinite(shown), np.asarray(norms["steps"]), names, identity)
    return f"{text(part)}{made}"


def _indented(name: str, level: str) -> str:
    if level == "root":
        return "whole gradient"
    return name if level == "tensor" else f"{name}.*"


def boxes_html(examples: Sequence[tuple[str, Mapping[str, Any]]], identity: str) -> str:
    """The same piece of a photograph once per method, with boxes; its pixels stand in the page once.

    Args:
        examples: pairs of a label and what `AerialTask.example` gives, all of one piece.
        identity: of these pictures within the page.
    """
    first = examples[0][1]
    wide, tall = first["size"]
    style = (
        f"<style>.{identity}{{background:url(data:image/jpeg;base64,{first['jpeg']}) 0 0/100% 100%;"
        f"aspect-ratio:{wide}/{tall}}}</style>"
    )
    figures = "".join(
        f'<div class="piece"><div class="{identity}"><svg viewBox="0 0 {wide} {tall}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">{box_marks(example)}</svg></div>'
        f"<p>{html.escape(label)}: {example['hit']} of {len(example['truth'])} hit</p></div>"
        for label, example in examples
    )
    return f'{style}<div class="pieces">{figures}</div>'


def box_marks(example: Mapping[str, Any]) -> str:
    """Rectangles of the boxes drawn by hand and of those found, in pixels of the piece."""
    marks = [_rectangle(box, TRUTH_COLOUR, 1.0, 1.5) for box in example["truth"]]
    marks += [_rectangle(box[:4], FOUND_COLOUR, 0.35 + 0.65 * box[4], 2.5) for box in example["found"]]
    return "".join(marks)


def _rectangle(box: Sequence[float], colour: str, opacity: float, width: float) -> str:
    x0, y0, x1, y1 = (min(max(value, -1e4), 1e4) for value in box)
    return (
        f'<rect x="{x0:.0f}" y="{y0:.0f}" width="{max(x1 - x0, 0):.0f}" height="{max(y1 - y0, 0):.0f}" fill="none" '
        f'stroke="{colour}" stroke-opacity="{opacity:.2f}" stroke-width="{width:g}"/>'
    )


_CSS = """
.pieces{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:12px}
.pieces svg{width:100%;height:100%;display:block}.piece p{font-size:.9rem;margin-top:4px}
"""
