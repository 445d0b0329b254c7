"""The measured section of docs/chain.md, written from the raw results.

python benchmarks/chain/tables.py        # rewrites what stands between the markers in docs/chain.md
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "chain.md"
START, END = "<!-- measured: written by benchmarks/chain/tables.py -->", "<!-- end of measured -->"


def load(name: str) -> dict[str, Any] | None:
    """One result file, None where that task has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(name: str, data: dict[str, Any]) -> str:
    """Where the numbers are from."""
    where = data["conditions"]
    link = f"[{name}.json](../benchmarks/results/{name}.json)"
    return f"{where['date']}, {where['cpu']}, one thread, `{data['command']}`, {link}."


def detector() -> list[str]:
    """Scores of the two-headed detector by method and optimizer."""
    lines = []
    for optimizer, title in (("sgdm", "SGD with momentum 0.9"), ("adamw", "AdamW")):
        name = f"chain_detector_two-tower_{optimizer}"
        data = load(name)
        if data is None:
            lines += [f"Detector, {title}: not run.", ""]
            continue
        lines += [f"Two-headed detector (workload `detection`), {title}, {data['options']['steps']} steps; score:", ""]
        lines += [
            "| method | best of the grid (median of tuning seeds) | fresh seeds, median [range] |",
            "|---|---|---|",
        ]
        for method in dict.fromkeys(cell["method"] for cell in data["grid"]):
            cells = [cell for cell in data["grid"] if cell["method"] == method]
            best = max(cells, key=lambda cell: statistics.median(cell["scores"]))
            fresh = [row["score"] for row in data["fresh"] if row["method"] == method]
            shown = (
                f"{statistics.median(fresh):.3f} [{min(fresh):.3f} to {max(fresh):.3f}], n = {len(fresh)}"
                if fresh
                else "not run"
            )
            tuned = f"{statistics.median(best['scores']):.3f} (rate {best['rate']:g}, strength {best['strength']:g})"
            lines.append(f"| {method} | {tuned} | {shown} |")
        lines += ["", source(name, data), ""]
    return lines


def healthy_heads() -> list[str]:
    """Scores of healthy heads without and with the fork rule."""
    data = load("chain_healthy_heads")
    if data is None:
        return ["Healthy heads: not run.", ""]
    options = data["options"]
    lines = [
        f"Detector with heads as they should be, AdamW at {options['rate']:g}, {options['steps']} steps, "
        f"medians of {options['seeds']} seeds:",
        "",
        "| variant | none | fork rule + module limits | change |",
        "|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in data["rows"]):
        mine = [row for row in data["rows"] if row["variant"] == variant]
        plain, ruled = (statistics.median(row[key] for row in mine) for key in ("none", "fork rule + module limits"))
        lines.append(f"| {variant} | {plain:.3f} | {ruled:.3f} | {ruled / plain - 1:+.1%} |")
    return [*lines, "", source("chain_healthy_heads", data), ""]


def deep_stack() -> list[str]:
    """The plain stack before and after `balance_`."""
    data = load("chain_deep_stack")
    if data is None:
        return ["Plain deep stack: not run.", ""]
    told = data["rows"][0]["diagnosis"][0][2]
    options = data["options"]
    lines = [
        f"Plain stack of {options['depth']} convolutions, initialised at {options['gain']} x He, digits, AdamW at "
        f'{options["rate"]:g} with a global limit of 1, {options["steps"]} steps. `diagnose` says first: "{told}".',
        "",
        "| initialisation | log10 of the backward gain | accuracy |",
        "|---|---|---|",
    ]
    for row in data["rows"]:
        lines.append(f"| {row['setting']} | {row['log10_gain_to_the_first_layer']:+.2f} | {row['accuracy']:.3f} |")
    return [*lines, "", f"n = {options['seeds']} seed. " + source("chain_deep_stack", data), ""]


def temporal_order() -> list[str]:
    """Solved runs by length and method."""
    data = load("chain_temporal_order")
    if data is None:
        return ["Temporal order: not run.", ""]
    rows = data["rows"]
    lines = [
        "Temporal order, runs solved (updates until then):",
        "",
        "| length | method | solved | updates |",
        "|---|---|---|---|",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if (row["length"], row["method"]) == (length, method)]
            if mine:
                updates = ", ".join(str(row["updates"]) for row in mine)
                lines.append(
                    f"| {length} | {method} | {sum(row['solved'] for row in mine)} of {len(mine)} | {updates} |"
                )
    return [*lines, "", source("chain_temporal_order", data), ""]


def healthy_runs() -> list[str]:
    """Change of the final loss by the default ChainSplitter."""
    data = load("chain_healthy_runs")
    if data is None:
        return ["Healthy runs: not run.", ""]
    (steps,) = {row["steps"] for row in data["rows"]}
    lines = [
        f"Healthy runs, AdamW at 1e-3, {steps} steps, mean loss of the last tenth, default ChainSplitter against none, "
        "the same seeds:",
        "",
        "| run | n | none, mean and standard deviation over seeds | guarded, mean | change, mean | largest of one seed "
        "| signals bounded |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in dict.fromkeys(row["run"] for row in data["rows"]):
        mine = [row for row in data["rows"] if row["run"] == run]
        plain, change = [row["plain"] for row in mine], [row["change"] for row in mine]
        guarded = statistics.mean(row["guarded"] for row in mine)
        lines.append(
            f"| {run} | {len(mine)} | {statistics.mean(plain):.4f}, {statistics.stdev(plain):.4f} "
            f"({statistics.stdev(plain) / statistics.mean(plain):.1%}) | {guarded:.4f} | "
            f"{statistics.mean(change):+.2%} | {max(change, key=abs):+.2%} | "
            f"{', '.join(str(row['bounded']) for row in mine)} |"
        )
    return [*lines, "", source("chain_healthy_runs", data), ""]


def cost() -> list[str]:
    """Ratio of a training step with hooks to one without."""
    data = load("chain_cost")
    if data is None:
        return ["Cost of the hooks: not run.", ""]
    lines = [
        "Cost on a 6-layer GPT (width 128, batch 8 x 64), processor time with hooks over without, in turn:",
        "",
    ]
    for name, row in data["result"].items():
        low, _, high = row["ratio_quartiles"]
        lines.append(f'- `at="{name}"`, {row["joints"]} joints: {row["ratio"]:.3f} (quartiles {low:.3f} to {high:.3f})')
    return [*lines, "", source("chain_cost", data), ""]


def measured() -> str:
    """The whole section."""
    lines: list[str] = []
    for line in [*detector(), *healthy_heads(), *deep_stack(), *temporal_order(), *healthy_runs(), *cost()]:
        if line.startswith("| ") and not lines[-1]:  # the first line of a table: what holds its figures
            lines += ["<!-- evidence: tests/chain/test_claims.py -->", ""]
        lines.append(line)
    return "\n".join(lines).strip()


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(START)
    PAGE.write_text(f"{before}{START}\n\n{measured()}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
