"""The measured section of docs/results/chain.md, written from the raw results.

python benchmarks/chain/tables.py        # rewrites what stands between the markers in docs/results/chain.md
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tables import filled

METHODS = ("SGD", "global clip", "clip + gain penalty", "per-step bounds")
ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs/results/chain.md"
START, END = "<!-- measured: written by benchmarks/chain/tables.py -->", "<!-- end of measured -->"


def load(name: str) -> dict[str, Any] | None:
    """One result file, None where that task has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def source(name: str, data: dict[str, Any]) -> str:
    """Where the numbers are from."""
    where = data["conditions"]
    before = "".join(f" ({', '.join(e['methods'])}: {e['date']}, {e['cpu']})" for e in data.get("earlier", []))
    link = f"[{name}.json](../../benchmarks/results/{name}.json)"
    return f"{where['date']}, {where['cpu']}{before}, one thread, `{data['command']}`, {link}."


def detector() -> list[str]:
    """Scores of the two-headed detector by method and optimizer."""
    lines = []
    for optimizer, title in (("sgdm", "SGD with momentum 0.9"), ("adamw", "AdamW")):
        name = f"chain_detector_two-tower_{optimizer}"
        data = load(name)
        if data is None:
            lines += [f"Detector, {title}: not run.", ""]
            continue
        lines += [
            f"### Detector, {title}",
            "",
            f"Two-headed detector (workload `detection`), {title}, {data['options']['steps']} steps; score:",
            "",
        ]
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
    """Change of the score of healthy heads, seed by seed."""
    data = load("chain_healthy_heads")
    if data is None:
        return ["Healthy heads: not run.", ""]
    rows = data["rows"]
    (steps,), (rate,) = {row["steps"] for row in rows}, {row["rate"] for row in rows}
    lines = [
        "### Healthy heads",
        "",
        f"Detector whose heads do not explode, AdamW at {rate:g}, {steps} steps; change of the score against none, "
        "seed by seed, mean and standard error:",
        "",
        "| variant | method | n | none, mean | method, mean | change |",
        "|---|---|---|---|---|---|",
    ]
    for variant, method in dict.fromkeys((row["variant"], row["method"]) for row in rows):
        if method == "none":
            continue
        mine, plain = (
            {r["seed"]: r["score"] for r in rows if (r["variant"], r["method"]) == (variant, m)}
            for m in (method, "none")
        )
        seeds = sorted(mine.keys() & plain.keys())
        changes = [mine[seed] / plain[seed] - 1 for seed in seeds]
        means = [statistics.mean(scores[seed] for seed in seeds) for scores in (plain, mine)]
        error = f" +- {statistics.stdev(changes) / math.sqrt(len(seeds)):.1%}" if len(seeds) > 1 else ""
        lines.append(
            f"| {variant} | {method} | {len(seeds)} | {means[0]:.3f} | {means[1]:.3f} | "
            f"{statistics.mean(changes):+.1%}{error} |"
        )
    return [*lines, "", source("chain_healthy_heads", data), ""]


def fork_signals() -> list[str]:
    """Sizes of the heads' signals at the fork, unbounded."""
    data = load("chain_fork_signals")
    if data is None:
        return ["Signals at the fork: not run.", ""]
    steps, rate = data["options"]["steps"], data["options"]["rate"]
    lines = [
        "### Signals at the fork",
        "",
        f"Norms of the heads' signals at the fork where nothing is bounded, AdamW at {rate:g}, one seed. Cells are "
        f"means of ten steps: the first ten, the ten up to step {steps // 3}, and the last ten.",
        "",
        "| detector | head | first | later | last |",
        "|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in data["rows"]):
        mine = [row["norms"] for row in data["rows"] if row["variant"] == variant]
        for name in mine[0]:
            head = name.removeprefix("detector.").split("_")[0]
            lines.append(f"| {variant} | {head} | {' | '.join(f'{norms[name]:.2g}' for norms in mine)} |")
    return [*lines, "", source("chain_fork_signals", data), ""]


def deep_stack() -> list[str]:
    """The plain stack before and after `balance_`."""
    data = load("chain_deep_stack")
    if data is None:
        return ["Plain deep stack: not run.", ""]
    told = data["rows"][0]["diagnosis"][0][2]
    options = data["options"]
    lines = [
        "### Plain deep stack",
        "",
        f"Plain stack of {options['depth']} convolutions, initialised at {options['gain']} x He, digits, AdamW at "
        f'{options["rate"]:g} with a global limit of 1, {options["steps"]} steps. `diagnose` says first: "{told}".',
        "",
        "| initialisation | log10 of the backward gain | accuracy |",
        "|---|---|---|",
    ]
    for row in data["rows"]:
        lines.append(f"| {row['setting']} | {row['log10_gain_to_the_first_layer']:+.2f} | {row['accuracy']:.3f} |")
    return [*lines, "", f"n = {options['seeds']} seed. " + source("chain_deep_stack", data), ""]


def long_tasks() -> list[str]:
    """Solved runs by task, length and method."""
    lines = []
    for name, title in (("chain_temporal_order", "Temporal order"), ("chain_adding", "Adding")):
        data = load(name)
        if data is None:
            lines += [f"{title}: not run.", ""]
            continue
        lines += [
            f"### {title}",
            "",
            f"{title}, runs solved; the updates that it took, or the least share of wrong sequences where it was not "
            "solved within the updates that every method got:",
            "",
            "| length | updates | method | solved | after, or least error |",
            "|---|---|---|---|---|",
        ]
        keys = dict.fromkeys((row["length"], row["updates"]) for row in data["rows"])
        for (length, updates), method in itertools.product(keys, METHODS):
            key = (length, updates, method)
            mine = [row for row in data["rows"] if (row["length"], row["updates"], row["method"]) == key]
            if mine:
                told = ", ".join(f"{r['after']:,}" if r["solved"] else f"{r['best_error']:.0%}" for r in mine)
                solved = sum(row["solved"] for row in mine)
                lines.append(f"| {length} | {updates:,} | {method} | {solved} of {len(mine)} | {told} |")
        lines += ["", source(name, data), ""]
    return lines


def healthy_runs() -> list[str]:
    """Change of the final loss by the default ChainSplitter."""
    data = load("chain_healthy_runs")
    if data is None:
        return ["Healthy runs: not run.", ""]
    (steps,) = {row["steps"] for row in data["rows"]}
    lines = [
        "### Healthy runs",
        "",
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
        "### Cost of the hooks",
        "",
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
    for line in [
        *detector(),
        *healthy_heads(),
        *fork_signals(),
        *deep_stack(),
        *long_tasks(),
        *healthy_runs(),
        *cost(),
    ]:
        if line.startswith("| ") and not lines[-1]:  # the first line of a table: what holds its figures
            lines += ["<!-- evidence: tests/chain/test_claims.py -->", ""]
        lines.append(line)
    return "\n".join(lines).strip()


def in_short() -> str:
    """What was asked and what came out, in one paragraph; "" where a part has not been run."""
    sgd, adamw = (load(f"chain_detector_two-tower_{name}") for name in ("sgdm", "adamw"))
    heads, order, stack = (load(f"chain_{name}") for name in ("healthy_heads", "temporal_order", "deep_stack"))
    if sgd is None or adamw is None or heads is None or order is None or stack is None:
        return ""

    def score(data: dict[str, Any], method: str) -> str:
        return f"{statistics.median(row['score'] for row in data['fresh'] if row['method'] == method):.3f}"

    def solved(method: str) -> str:
        mine = [row for row in order["rows"] if (row["length"], row["method"]) == (20, method)]
        return f"{sum(row['solved'] for row in mine)} of {len(mine)}"

    lost = []
    for variant in dict.fromkeys(row["variant"] for row in heads["rows"]):
        mine, plain = (
            {row["seed"]: row["score"] for row in heads["rows"] if (row["variant"], row["method"]) == (variant, method)}
            for method in ("fork rule + module limits", "none")
        )
        lost.append(100 * (1 - statistics.mean(mine[seed] / plain[seed] for seed in mine.keys() & plain.keys())))
    before, after = stack["rows"][0]["accuracy"], stack["rows"][-1]["accuracy"]
    return (
        "Does it help to bound the signal between layers? On a detector with one exploding head, SGD with limits "
        f"at the fork and per module scores {score(sgd, 'fork rule + module limits')}. A tuned global clip scores "
        f"{score(sgd, 'global clip')}, and a tuned loss weight with module limits "
        f"{score(sgd, 'loss weight + module limits')}. `balance_` takes a plain stack of {stack['options']['depth']} "
        f"layers from {before:.3f} to {after:.3f} accuracy. With `gain_penalty` {solved('clip + gain penalty')} seeds "
        f"solve temporal order at length 20, with a clip alone {solved('global clip')}. Not met: in front of AdamW the "
        f"fork rule scores {score(adamw, 'fork rule + module limits')}, a global clip {score(adamw, 'global clip')}. "
        f"Healthy heads lose {min(lost):.0f} to {max(lost):.0f} % by it, so it is off there. No method solves length "
        "100.\n"
    )


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(START)
    before = filled(before, {"in short": in_short()})
    PAGE.write_text(f"{before}{START}\n\n{measured()}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
