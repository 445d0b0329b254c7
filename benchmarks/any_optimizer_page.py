"""The tables of docs/results/any-optimizer.md from the raw file.

python -m benchmarks.any_optimizer_page            # writes summary.json and the tables of the page
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PAGES", "filled", "tables"]

FOLDER = Path(__file__).parent / "results" / "any-optimizer"
BOUNDS = Path(__file__).parent / "results" / "sgd-bounds.jsonl"
PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("results/any-optimizer.md", "with-your-optimizer.md")]
TASKS = ("text", "detection")
FAULTS = ("one NaN", "row x 1e6", "batch x 1e3", "layer x 1e3")
CONTROLS = ("none", "default", "clip 1", "ZClip", "skip")
OPTIMIZERS = ("Adam", "AdamW", "Muon", "SOAP", "Lion", "Adafactor", "SGD", "schedule-free", "Prodigy")

Cell = tuple[str, str, str, str, str]
Runs = dict[Cell, dict[str, float]]


def read() -> tuple[Runs, dict[tuple[str, str], str]]:
    """Return, per task, optimizer, control, fault and rate, the loss of each seed; and the learning rates chosen.

    A loss that is not finite is inf.
    """
    with (FOLDER / "runs.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    chosen = {(r["task"], r["optimizer"]): r["lr"] for r in rows if r["control"] == "default"}
    runs: Runs = defaultdict(dict)
    for r in rows:
        if r["lr"] == chosen.get((r["task"], r["optimizer"])):
            loss = float(r["final_loss"])
            cell = (r["task"], r["optimizer"], r["control"], r["fault"], r["rate"])
            runs[cell][r["seed"]] = loss if math.isfinite(loss) else math.inf
    return runs, chosen


def excess(runs: Runs, task: str, optimizer: str, control: str, fault: str, rate: str) -> list[float]:
    """Per cent above the clean run without a control, of the same seed; inf where the run died."""
    clean = runs.get((task, optimizer, "none", "clean", "0.0"), {})
    found = runs.get((task, optimizer, control, fault, "0.0" if fault == "clean" else rate), {})
    return [100 * (loss / clean[seed] - 1) for seed, loss in sorted(found.items()) if seed in clean]


def shown(values: list[float]) -> str:
    """The median, or how many died."""
    dead = sum(math.isinf(value) for value in values)
    if not values:
        return "-"
    if dead:
        return "dead" if dead == len(values) else f"{dead} of {len(values)} dead"
    middle = statistics.median(values)
    return f"{middle:+.1f}" if middle < 1000 else "> 1000"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], evidence: str = "summary.json") -> str:
    """A table in Markdown, with its evidence; without rows the words for that."""
    head, rows = list(head), list(rows)
    if not rows:
        return "Not run."
    lines = [f"<!-- evidence: benchmarks/results/any-optimizer/{evidence} -->"]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def seeds_of(counts: list[int]) -> str:
    """How many seeds the cells have, as a sentence."""
    least, most = min(counts, default=0), max(counts, default=0)
    return f"\n\nSeeds per cell: {least if least == most else f'{least} to {most}'}."


def tables() -> tuple[dict[str, str], dict[str, object]]:
    """Return the tables by name, and the numbers that stand in them."""
    runs, chosen = read()
    numbers: dict[str, object] = {}
    made: dict[str, str] = {}
    counts: list[int] = []

    def cell(name: str, values: list[float]) -> str:
        if values:
            counts.append(len(values))
        finite = [round(value, 4) for value in values if math.isfinite(value)]
        if finite:
            numbers[name] = finite
        return shown(values)

    def of(task: str, optimizer: str, control: str, fault: str, rate: str) -> str:
        values = excess(runs, task, optimizer, control, fault, rate)
        return cell(f"{task} / {optimizer} / {control} / {fault} / {rate}", values)

    rows = []
    for optimizer in OPTIMIZERS:
        row = [optimizer]
        for task in TASKS:
            losses = list(runs.get((task, optimizer, "none", "clean", "0.0"), {}).values())
            row += [f"`{chosen.get((task, optimizer), '-')}`", cell(f"{task} / {optimizer} / loss", losses).lstrip("+")]
            if losses:
                row[-1] = f"{statistics.median(losses):.2f}"
        rows.append(row)
    made["rates"] = table(["optimizer", "rate, text", "loss, text", "rate, detection", "loss, detection"], rows)

    for task in TASKS:
        counts.clear()
        rows = [
            [
                optimizer,
                of(task, optimizer, "default", "clean", "0.05"),
                *(
                    f"{of(task, optimizer, 'none', fault, '0.05')} → {of(task, optimizer, 'default', fault, '0.05')}"
                    for fault in FAULTS
                ),
            ]
            for optimizer in OPTIMIZERS
        ]
        made[f"5, {task}"] = table(["optimizer", "no fault", *FAULTS], rows) + seeds_of(counts)

    for task in TASKS:
        rows = []
        counts.clear()
        for optimizer in OPTIMIZERS:
            for control in ("clip 1", "ZClip", "skip"):
                cells = [of(task, optimizer, control, fault, "0.05") for fault in ("clean", *FAULTS)]
                if set(cells) != {"-"}:
                    rows.append([optimizer, control, *cells])
        made[f"others, {task}"] = table(["optimizer", "control", "no fault", *FAULTS], rows) + seeds_of(counts)

    for rate in ("0.05", "0.2", "0.01"):
        rows = [[control, *_totals(runs, control, rate)] for control in CONTROLS]
        made[f"totals {rate}"] = table(["control", "runs", *TOTALS], rows)
        numbers[f"totals / {rate}"] = {row[0]: row[1:] for row in rows}

    for rate in ("0.2", "0.01"):
        rows = []
        counts.clear()
        for optimizer in OPTIMIZERS:
            for task in TASKS:
                cells = [
                    f"{of(task, optimizer, 'none', fault, rate)} → {of(task, optimizer, 'default', fault, rate)}"
                    for fault in FAULTS
                ]
                if set(cells) != {"- → -"}:
                    rows.append([optimizer, task, *cells])
        made[f"rate {rate}"] = table(["optimizer", "task", *FAULTS], rows) + seeds_of(counts)

    rows = []
    for optimizer in OPTIMIZERS:
        row = [optimizer]
        for task in TASKS:
            losses = list(runs.get((task, optimizer, "none", "clean", "0.0"), {}).values())
            ours = excess(runs, task, optimizer, "default", "clean", "0.0")
            if len(losses) < 2 or not ours:
                row += ["-", "-"]
                continue
            spread = 100 * statistics.stdev(losses) / statistics.mean(losses)
            numbers[f"{task} / {optimizer} / spread"] = round(spread, 4)
            numbers[f"{task} / {optimizer} / worst"] = [round(min(ours), 4), round(max(ours), 4)]
            mean, seeds = statistics.mean(ours), f"{len(ours)} seed" + "s" * (len(ours) > 1)
            row += [f"{mean:+.1f} ({min(ours):+.1f} to {max(ours):+.1f}), {seeds}"]
            row += [f"{spread:.1f}"]
        rows.append(row)
    head = ["optimizer", "text: default, % of none", "seeds of none vary by", "detection", "seeds vary by"]
    made["clean"] = table(head, rows)

    rows = []
    for optimizer in OPTIMIZERS:
        row = [optimizer]
        for task in TASKS:
            for control in ("relative .2", "default"):
                clean = excess(runs, task, optimizer, control, "clean", "0.0")
                faulty = [excess(runs, task, optimizer, control, fault, "0.05") for fault in FAULTS]
                if not clean or not all(faulty):
                    row.append("-")
                    continue
                both = [statistics.mean(clean), max(statistics.median(values) for values in faulty)]
                numbers[f"{task} / {optimizer} / {control} / clean and worst"] = [round(value, 4) for value in both]
                row.append(", ".join(f"{value:+.1f}" for value in both))
        if "-" not in row:
            rows.append(row)
    made["factor"] = table(["optimizer", "text, 0.2", "text, 1", "detection, 0.2", "detection, 1"], rows)

    made["guide"] = table(
        ["optimizer", "what to write", "a NaN, text", "worst other fault, text", "worst other fault, detection"],
        [
            [
                optimizer,
                WRITE.get(optimizer, "as above"),
                *(
                    f"{of(task, optimizer, 'none', fault, '0.05')} → {of(task, optimizer, 'default', fault, '0.05')}"
                    for task, fault in (("text", "one NaN"), *((task, _worst(runs, task, optimizer)) for task in TASKS))
                ),
            ]
            for optimizer in OPTIMIZERS
        ],
    )

    rows = []
    counts.clear()
    for task in TASKS:
        for control in ("none", "default", "tau .06", "tau .1", "tau .3", "isolation"):
            cells = [of(task, "SGD", control, fault, "0.05") for fault in ("clean", *FAULTS)]
            rows.append([task, f"`{NAMES[control]}`", *cells])
    made["SGD"] = table(["task", "in front of SGD", "no fault", *FAULTS], rows) + seeds_of(counts)
    made["rules"], numbers["rules"] = _rules(runs)
    return made, numbers


TOTALS = ("within 3 % of clean", "hurt by more than 10 %", "dead", "median, %")


def _totals(runs: Runs, control: str, rate: str) -> list[str]:
    """Over all faults of both tasks: how many runs end near a clean one, are hurt, or die; and their median."""
    cells = [excess(runs, task, o, control, fault, rate) for task in TASKS for o in OPTIMIZERS for fault in FAULTS]
    values = [value for cell in cells for value in cell]
    if not values:
        return ["-"] * (1 + len(TOTALS))
    dead = sum(math.isinf(value) for value in values)
    near = sum(value <= 3 for value in values)
    hurt = sum(value > 10 for value in values) - dead
    share = [f"{100 * count / len(values):.0f} %" for count in (near, hurt, dead)]
    return [str(len(values)), *share, f"{statistics.median(values):+.1f}" if dead * 2 < len(values) else "dead"]


TASKS_OF_RULES = {
    "text, clean": (0.3,),
    "detection, clean": (0.03,),
    "exploding detection": (0.03, 0.1, 0.3),
    "hot stack": (0.1, 1.0),
    "GPT": (0.1, 0.3, 1.0),
}


def _rules(runs: Runs) -> tuple[str, dict[str, list[float | None]]]:
    """Other bounds in front of SGD: medians over the seeds, clean runs in per cent above none."""
    found: dict[tuple[str, str, float], list[float | None]] = defaultdict(list)
    for line in BOUNDS.read_text(encoding="utf8").splitlines():
        row = json.loads(line)
        score = row["score"]
        if row["task"].endswith("clean"):
            none = runs[row["task"].partition(",")[0], "SGD", "none", "clean", "0.0"][str(row["seed"])]
            score = round(100 * (score / none - 1), 4)
        found[row["rule"], row["task"], row["lr"]].append(score)
    rows = []
    for rule in dict.fromkeys(rule for rule, *_ in found):
        row = [rule]
        for task, lrs in TASKS_OF_RULES.items():
            cells = []
            for lr in lrs:
                scores = found.get((rule, task, lr), [])
                known = [score for score in scores if score is not None]
                if not scores:
                    cells.append("-")
                elif len(known) < len(scores):
                    cells.append("dead")
                elif task.endswith("clean"):
                    cells.append(f"{statistics.mean(known):+.1f}")
                else:
                    cells.append(f"{statistics.median(known):.3f}")
            row.append(", ".join(cells))
        rows.append(row)
    made = table(["rule", *TASKS_OF_RULES], rows)
    return made, {" / ".join(map(str, key)): values for key, values in found.items()}


def _worst(runs: Runs, task: str, optimizer: str) -> str:
    """The fault, other than a NaN, that cost a run without a control most."""

    def cost(fault: str) -> float:
        return statistics.median(excess(runs, task, optimizer, "none", fault, "0.05") or [-math.inf])

    return max(FAULTS[1:], key=cost)


WRITE = {
    "Muon": "as below",
}
NAMES = {
    "none": "nothing",
    "default": "RelativeStep(0.03, length=1.0), the default",
    "tau .06": "RelativeStep(0.06, length=1.0)",
    "tau .1": "RelativeStep(0.1, length=1.0)",
    "tau .3": "RelativeStep(0.3, length=1.0), collective=True",
    "isolation": "Relative(0.2), collective=True",
}


def main() -> None:
    """Write the numbers and the tables."""
    made, numbers = tables()
    (FOLDER / "summary.json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf8")
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf8"), made), encoding="utf8")


def filled(text: str, made: dict[str, str]) -> str:
    """A page with the tables in their places."""
    for name, content in made.items():
        start, stop = f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
        before, found, rest = text.partition(start)
        if found:
            _, ended, rest = rest.partition(stop)
            if not ended:
                raise ValueError(f"expected a line and {stop.strip()!r} after {start.strip()!r}")
            text = before + start + content + stop + rest
    return text


if __name__ == "__main__":
    main()
