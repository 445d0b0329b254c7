"""The tables and the picture of docs/results/README.md."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.proof import plan, store, words
from benchmarks.proof.numbers import COLUMNS, Row, numbers
from benchmarks.proof.picture import draw
from benchmarks.tables import filled, table, with_range

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "README.md"
PICTURE = ROOT / "docs" / "results" / "behind.svg"
EVIDENCE = "benchmarks/results/proof/tables.json"


def _cell(entry: Row | None, *, first: bool) -> str:
    if entry is None:
        return ""
    value = entry["fresh"]["median"] if entry["fresh"] else entry["choosing"]
    if value is None:
        return "lost"
    mark = "" if entry["fresh"] else "\\*"
    shown = f"{value:.3f}{mark}"
    return f"**{shown}**" if first else shown


def main_table(rows: list[Row]) -> str:
    """Every method at its best."""
    lines = []
    for row in rows:
        cells = [_cell(row["methods"].get(m), first=m == row["first"]) for m in COLUMNS]
        arrow = "↑" if row["higher_is_better"] else "↓"
        what = [f"{row['workload']}, {row['steps']}", f"{row['metric'].replace('_', ' ')} {arrow}"]
        rank = "" if row["rank"] is None else f"{row['rank']} of {row['of']}"
        beside = "" if row["margin"] is None else f"{100 * row['margin']:+.1f} %"
        ahead = f"{row['ahead_on']} of {row['shared']}" if row["shared"] else ""
        lines.append([*what, *cells, rank, beside, ahead])
    head = ["workload, steps", "metric", *COLUMNS.values(), "GSO's rank", "beside the best other", "ahead on"]
    return table(head, lines, EVIDENCE) if lines else ""


def usual_table(rows: list[Row]) -> str:
    """Every method at the rate that its authors give."""
    names = {m: title for m, title in COLUMNS.items() if any(r["methods"].get(m, {}).get("usual") for r in rows)}
    lines = []
    for row in rows:
        values = {m: row["methods"][m]["usual"] for m in names if row["methods"].get(m)}
        held = [value for value in values.values() if value is not None]
        best = (max if row["higher_is_better"] else min)(held)
        shown = {m: f"**{v:.3f}**" if v == best else f"{v:.3f}" for m, v in values.items() if v is not None}
        lines.append([row["workload"], *(shown.get(m, "") for m in names)])
    return table(["workload", *(f"{t} {plan.RATES[m][0]:g}" for m, t in names.items())], lines, EVIDENCE)


def time_table(costs: dict[str, Row]) -> str:
    """Processor time per step, and the same over AdamW's."""
    return _costs(costs, lambda entry: f"{entry['over_adamw']:.2f} ({statistics.median(entry['ms']):.1f})")


def memory_table(costs: dict[str, Row]) -> str:
    """Bytes of the optimizer per byte of weights."""
    return _costs(costs, lambda entry: f"{entry['state_per_weight']:.1f}")


def _costs(costs: dict[str, Row], shown: Callable[[Row], str]) -> str:
    lines = [[plan.CASES[name].title, *(shown(found[method]) for method in COLUMNS)] for name, found in costs.items()]
    return table(["workload", *COLUMNS.values()], lines, EVIDENCE) if lines else ""


def _over_rates(rows: list[Row], name: str) -> str:
    """A number of each run of the sensitivity over the rate."""
    lines = []
    for row in rows:
        shown = ["lost" if value is None else f"{value:.1f}" for value in row[name]]
        lines.append([f"{row['size']}, {COLUMNS[row['method']]}", *shown])
    return table(["parameters, method", *_factors()], lines, EVIDENCE) if lines else ""


def _factors() -> list[str]:
    return [f"x {factor:.2g}" for factor in plan.AROUND]


def sensitivity_table(rows: list[Row]) -> str:
    """Losses over the rate, and the mean loss above the best."""
    lines = []
    for row in rows:
        losses = [f"{loss:.2f}" for loss in row["losses"]]
        what = [f"{row['size']}, {COLUMNS[row['method']]}", f"{row['usual']:g}"]
        lines.append([*what, *losses, f"**{row['sensitivity']:.2f}**"])
    return table(["parameters, method", "usual", *_factors(), "sensitivity"], lines, EVIDENCE) if lines else ""


def outputs_table(rows: list[Row]) -> str:
    """The log of the partition function over the steps."""
    steps = [300 * at for at in (1, 2, 4, 6, 8, 10)]
    lines = []
    for row in rows:
        values = [row["log_partition_over_steps"][at // 300 - 1] for at in steps]
        what = [f"{COLUMNS[row['method']]}, {row['lr']:g}", f"{row['score']:.2f}"]
        lines.append([*what, *(f"{value:.1f}" for value in values)])
    return table(["method, rate", "val loss", *(f"step {at:,}" for at in steps)], lines, EVIDENCE) if lines else ""


PLAN_WORDS = {
    "gso": "rows (default)",
    "gso-tensors": "tensors",
    "gso-lbf": "L-BF's rectangles",
    "gso-tree": "rows and modules (Tree-SP)",
    "gso-lbf-blocks": "rows; L-BF's rectangles made orthogonal one by one",
}
PART_WORDS = {"experts": "experts, the first one hot", "detection": "two-tower detector, one tower explodes"}


def strategies_table(rows: list[Row]) -> str:
    """Plans of GSO."""
    lines = []
    for name, said in PLAN_WORDS.items():
        made = [row["plans"].get(name) for row in rows]
        lines.append([said, *("" if found is None else with_range(list(found["scores"].values())) for found in made)])
    return table(["what is bounded together", *(PART_WORDS[row["workload"]] for row in rows)], lines, EVIDENCE)


def sizes_table(rows: list[Row]) -> str:
    """The larger GPTs."""
    names = {m: t for m, t in COLUMNS.items() if any(m in row["methods"] for row in rows)}
    lines = []
    for row in rows:
        found = {m: row["methods"][m] for m in names if m in row["methods"]}
        cells = {m: f"{r['score']:.3f} at {r['lr']:g}, {r['cpu_ms_a_step']:.0f} ms" for m, r in found.items()}
        what = [f"{row['parameters'] / 1e6:.1f} M", str(row["steps"])]
        lines.append([*what, *(cells.get(m, "") for m in names)])
    return table(["parameters", "steps", *names.values()], lines, EVIDENCE) if lines else ""


def short_table(rows: list[Row]) -> str:
    """GSO at two shares and Muon in short runs."""
    lines = []
    for parameters in dict.fromkeys(row["parameters"] for row in rows):
        here = [row for row in rows if row["parameters"] == parameters]
        found = {(row["method"], row["lr"]): f"{row['score']:.3f}" for row in here}
        lines.append([f"{parameters / 1e6:.1f} M", here[0]["steps"], *(found.get(cell, "") for cell in plan.SHORT)])
    head = ["parameters", "steps", *(f"{COLUMNS[method]} {lr:g}" for method, lr in plan.SHORT)]
    return table(head, lines, EVIDENCE) if lines else ""


def photographs_table(found: Row) -> str:
    """Both metrics on both sites, over the fresh seeds."""
    lines = []
    for method, held in found.items():
        spans = [held[name] for name in ("map50", "map", "test_map50", "test_map")]
        cells = [f"{span['median']:.3f} ({span['min']:.3f} to {span['max']:.3f})" for span in spans]
        lines.append([f"{COLUMNS[method]} {held['lr']:g}", *cells])
    head = ["method, rate", "mAP50", "mAP50-95", "other site, mAP50", "other site, mAP50-95"]
    return table(head, lines, EVIDENCE) if lines else ""


def parts(made: Row) -> dict[str, str]:
    """What stands between the marks of the page."""
    own = [row for row in made["rows"] if row["source"] == "proof"]
    tables = {
        "main": main_table(made["rows"]),
        "cosine": main_table(made["cosine"]),
        "usual": usual_table(own),
        "photographs": photographs_table(made["photographs"]),
        "time": time_table(made["costs"]),
        "memory": memory_table(made["costs"]),
        "sensitivity": sensitivity_table(made["sensitivity"]),
        "attention": _over_rates(made["sensitivity"], "attention"),
        "partition": _over_rates(made["sensitivity"], "log_partition"),
        "outputs": outputs_table(made["outputs"]),
        "strategies": strategies_table(made["strategies"]),
        "sizes": sizes_table(made["sizes"]),
        "short": short_table(made["short"]),
    }
    sentences = {
        "opening": words.opening_words(made),
        "count": words.count_words(made["count"]),
        "behind": words.behind_words(made["rows"]),
        "cosine-words": words.cosine_words(made["cosine"], made["rows"]),
        "photographs-words": words.photographs_words(made["photographs"]),
        "time-words": words.time_words(made["costs"]),
        "sensitivity-words": words.sensitivity_words(made["sensitivity"]),
        "attention-words": words.attention_words(made["sensitivity"]),
        "partition-words": words.partition_words(made["sensitivity"]),
        "outputs-words": words.outputs_words(made["outputs"]),
        "strategies-words": words.strategies_words(made["strategies"]),
        "sizes-words": words.sizes_words(made["sizes"]),
        "short-words": words.short_words(made["short"]),
    }
    return tables | sentences


def main(asked_for: Sequence[str]) -> None:
    """Write the numbers, the page's tables and the picture."""
    argparse.ArgumentParser(prog="proof.py page", description=__doc__).parse_args(asked_for)
    made = numbers()
    store.TABLES.write_text(json.dumps(made, indent=1) + "\n", encoding="utf8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf8"), parts(made)), encoding="utf8")
    PICTURE.write_text(draw(made["rows"], COLUMNS), encoding="utf8")
    print(json.dumps(made["count"], indent=1))
