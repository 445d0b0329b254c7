"""The tables of docs/results/any-optimizer.md from the raw file, and the sentences that count its runs.

python -m benchmarks.any_optimizer_page            # writes summary.json, and the tables and sentences of the page
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from itertools import product
from pathlib import Path

from benchmarks import tables

__all__ = ["PAGES", "make"]

FOLDER = Path(__file__).parent / "results" / "any-optimizer"
BOUNDS = Path(__file__).parent / "results" / "sgd-bounds.jsonl"
PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("results/any-optimizer.md", "with-your-optimizer.md")]
TASKS = ("text", "detection")
FAULTS = ("one NaN", "row x 1e6", "batch x 1e3", "layer x 1e3")
CONTROLS = ("none", "default", "clip 1", "ZClip", "skip")
OPTIMIZERS = ("Adam", "AdamW", "Muon", "SOAP", "Lion", "Adafactor", "SGD", "schedule-free", "Prodigy")

WITHOUT_FAULT = ("0.01", "2")
"""At 1 % of 200 steps the draw of seed 2 hits no step at all."""

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
        if r["lr"] == chosen.get((r["task"], r["optimizer"])) and (r["rate"], r["seed"]) != WITHOUT_FAULT:
            loss = float(r["final_loss"])
            cell = (r["task"], r["optimizer"], r["control"], r["fault"], r["rate"])
            runs[cell][r["seed"]] = loss if math.isfinite(loss) else math.inf
    return runs, chosen


def excess(
    runs: Runs, task: str, optimizer: str, control: str, fault: str, rate: str, seeds: Container[str] | None = None
) -> list[float]:
    """Per cent above the clean run without a control, of the same seed; inf where the run died."""
    clean = runs.get((task, optimizer, "none", "clean", "0.0"), {})
    found = runs.get((task, optimizer, control, fault, "0.0" if fault == "clean" else rate), {})
    return [
        100 * (loss / clean[seed] - 1)
        for seed, loss in sorted(found.items())
        if seed in (seeds or clean) and seed in clean
    ]


def shown(values: list[float]) -> str:
    """The median, or how many died."""
    dead = sum(math.isinf(value) for value in values)
    if not values:
        return "-"
    if dead:
        return "dead" if dead == len(values) else f"{dead} of {len(values)} dead"
    middle = statistics.median(values)
    return f"{middle:+.1f}" if middle < 1000 else "> 1000"


EVIDENCE = "benchmarks/results/any-optimizer/summary.json"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table with its evidence; without rows nothing."""
    return tables.table(head, rows, EVIDENCE) if rows else ""


class Cells:
    """The cells of the tables, from the runs.

    Attributes:
        numbers: what stands in the cells, as evidence.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.numbers: dict[str, object] = {}
        self._counts: list[int] = []

    def losses(self, task: str, optimizer: str) -> list[float]:
        """Of the clean runs without a control."""
        return list(self.runs.get((task, optimizer, "none", "clean", "0.0"), {}).values())

    def excess(self, task: str, optimizer: str, control: str, fault: str, rate: str = "0.05") -> list[float]:
        """See `excess`."""
        return excess(self.runs, task, optimizer, control, fault, rate)

    def cell(self, task: str, optimizer: str, control: str, fault: str, rate: str = "0.05") -> str:
        """One control."""
        values = self.excess(task, optimizer, control, fault, rate)
        if values:
            self._counts.append(len(values))
        self.keep(" / ".join((task, optimizer, control, fault, rate)), values)
        return shown(values)

    def pair(self, task: str, optimizer: str, fault: str, rate: str = "0.05") -> str:
        """None and the default."""
        return " → ".join(self.cell(task, optimizer, control, fault, rate) for control in ("none", "default"))

    def keep(self, name: str, values: Iterable[float]) -> None:
        """Keep numbers as evidence."""
        finite = [round(value, 4) for value in values if math.isfinite(value)]
        if finite:
            self.numbers[name] = finite

    def seeds(self) -> str:
        """How many seeds the cells have since this was asked before, as a sentence."""
        least, most = min(self._counts, default=0), max(self._counts, default=0)
        self._counts.clear()
        return f"\nSeeds per cell: {least if least == most else f'{least} to {most}'}.\n"


def make() -> tuple[dict[str, str], dict[str, object]]:
    """Return the tables by name, and the numbers that stand in them."""
    runs, chosen = read()
    cells = Cells(runs)
    made = {"rates": _rates(cells, chosen)}
    for task in TASKS:
        made[f"5, {task}"] = _default(cells, task)
        made[f"others, {task}"] = _others(cells, task)
    for rate in ("0.05", "0.2", "0.01"):
        rows = [[control, *_totals(runs, control, rate)] for control in CONTROLS]
        made[f"totals {rate}"] = table(["control", "runs", *TOTALS], rows)
        cells.numbers[f"totals / {rate}"] = {row[0]: row[1:] for row in rows}
    for rate in ("0.2", "0.01"):
        made[f"rate {rate}"] = _at_rate(cells, rate)
        made[f"others {rate}"] = _others_at_rate(cells, rate)
    made["clean"] = _clean(cells)
    made["factor"] = _factor(cells)
    made["guide"] = _guide(cells)
    made["SGD"] = _sgd(cells)
    made["rules"], made["lengths"], cells.numbers["rules"] = _rules(runs)
    made["in short"] = _in_short(cells)
    made["words totals"] = _totals_words(runs)
    made |= {f"words {rate}": _beyond(runs, rate) for rate in SEEDS}
    return made, cells.numbers


def _rates(cells: Cells, chosen: Mapping[tuple[str, str], str]) -> str:
    rows = []
    for optimizer in OPTIMIZERS:
        row = [optimizer]
        for task in TASKS:
            losses = cells.losses(task, optimizer)
            cells.keep(f"{task} / {optimizer} / loss", losses)
            row += [f"`{chosen.get((task, optimizer), '-')}`", f"{statistics.median(losses):.2f}" if losses else "-"]
        rows.append(row)
    return table(["optimizer", "rate, text", "loss, text", "rate, detection", "loss, detection"], rows)


def _default(cells: Cells, task: str) -> str:
    rows = [
        [optimizer, cells.cell(task, optimizer, "default", "clean"), *(cells.pair(task, optimizer, f) for f in FAULTS)]
        for optimizer in OPTIMIZERS
    ]
    return table(["optimizer", "no fault", *FAULTS], rows) + cells.seeds()


def _others(cells: Cells, task: str) -> str:
    rows = []
    for optimizer, control in product(OPTIMIZERS, ("clip 1", "ZClip", "skip")):
        found = [cells.cell(task, optimizer, control, fault) for fault in ("clean", *FAULTS)]
        if set(found) != {"-"}:
            rows.append([optimizer, control, *found])
    return table(["optimizer", "control", "no fault", *FAULTS], rows) + cells.seeds()


def _at_rate(cells: Cells, rate: str) -> str:
    rows = []
    for optimizer, task in product(OPTIMIZERS, TASKS):
        found = [cells.pair(task, optimizer, fault, rate) for fault in FAULTS]
        if set(found) != {"- → -"}:
            rows.append([optimizer, task, *found])
    return table(["optimizer", "task", *FAULTS], rows) + cells.seeds()


def _others_at_rate(cells: Cells, rate: str) -> str:
    """In each cell the four faults, in their order."""
    rows = []
    for optimizer, task in product(OPTIMIZERS, TASKS):
        found = [[cells.cell(task, optimizer, control, fault, rate) for fault in FAULTS] for control in CONTROLS[2:]]
        if any(set(faults) != {"-"} for faults in found):
            rows.append([optimizer, task, *(", ".join(faults) for faults in found)])
    return table(["optimizer", "task", *CONTROLS[2:]], rows) + cells.seeds()


def _clean(cells: Cells) -> str:
    rows = []
    for optimizer in OPTIMIZERS:
        row = [optimizer]
        for task in TASKS:
            losses, ours = cells.losses(task, optimizer), cells.excess(task, optimizer, "default", "clean")
            if len(losses) < 2 or not ours:
                row += ["-", "-"]
                continue
            spread = 100 * statistics.stdev(losses) / statistics.mean(losses)
            cells.numbers[f"{task} / {optimizer} / spread"] = round(spread, 4)
            cells.numbers[f"{task} / {optimizer} / worst"] = [round(min(ours), 4), round(max(ours), 4)]
            mean, seeds = statistics.mean(ours), f"{len(ours)} seed" + "s" * (len(ours) > 1)
            row += [f"{mean:+.1f} ({min(ours):+.1f} to {max(ours):+.1f}), {seeds}", f"{spread:.1f}"]
        rows.append(row)
    head = ["optimizer", "text: default, % of none", "seeds of none vary by", "detection", "seeds vary by"]
    return table(head, rows)


def _factor(cells: Cells) -> str:
    rows = []
    for optimizer in OPTIMIZERS:
        row = [optimizer]
        for task, control in product(TASKS, ("relative .2", "default")):
            clean = cells.excess(task, optimizer, control, "clean")
            faulty = [cells.excess(task, optimizer, control, fault) for fault in FAULTS]
            if not clean or not all(faulty):
                break
            both = [statistics.mean(clean), max(statistics.median(values) for values in faulty)]
            cells.keep(f"{task} / {optimizer} / {control} / clean and worst", both)
            row.append(", ".join(f"{value:+.1f}" for value in both))
        else:
            rows.append(row)
    return table(["optimizer", "text, 0.2", "text, 1", "detection, 0.2", "detection, 1"], rows)


def _guide(cells: Cells) -> str:
    rows = []
    for optimizer in OPTIMIZERS:
        worst = [cells.pair(task, optimizer, _worst(cells.runs, task, optimizer)) for task in TASKS]
        rows.append([optimizer, WRITE.get(optimizer, "as above"), cells.pair("text", optimizer, "one NaN"), *worst])
    head = ["optimizer", "what to write", "a NaN, text", "worst other fault, text", "worst other fault, detection"]
    made = table(head, rows)
    cells.seeds()
    return made


def _sgd(cells: Cells) -> str:
    rows = [
        [task, f"`{words}`", *(cells.cell(task, "SGD", control, fault) for fault in ("clean", *FAULTS))]
        for task, (control, words) in product(TASKS, NAMES.items())
    ]
    return table(["task", "in front of SGD", "no fault", *FAULTS], rows) + cells.seeds()


SEEDS = {"0.05": ("0", "1", "2"), "0.2": ("0", "1", "2"), "0.01": ("0", "1", "3")}
"""The seeds that all optimizers have."""
TOTALS = ("within 3 % of clean", "hurt by more than 10 %", "dead", "median, %")


NEAR, HURT = 3.0, 10.0
"""Per cent above the clean run."""


def _every(runs: Runs, control: str, rate: str) -> list[float]:
    """What the runs of all optimizers, tasks and faults end above the clean one."""
    every = product(TASKS, OPTIMIZERS, FAULTS)
    cells = [excess(runs, task, o, control, fault, rate, SEEDS[rate]) for task, o, fault in every]
    return [value for cell in cells for value in cell]


def _counted(values: list[float]) -> tuple[int, int, int]:
    """How many runs end near a clean one, are hurt, or die."""
    dead = sum(math.isinf(value) for value in values)
    return sum(value <= NEAR for value in values), sum(value > HURT for value in values) - dead, dead


def _percent(count: int, values: list[float]) -> str:
    return f"{100 * count / len(values):.0f} %"


def _in_short(cells: Cells) -> str:
    """What was asked and what came out, in one paragraph."""
    values = {control: _every(cells.runs, control, "0.05") for control in CONTROLS}
    shares = {c: [_percent(count, found) for count in _counted(found)] for c, found in values.items()}
    often = _every(cells.runs, "default", "0.2")
    clean = {task: statistics.mean(cells.excess(task, "SGD", "default", "clean")) for task in TASKS}
    return (
        f"Does `GradientSplitter` help other optimizers? {len(OPTIMIZERS)} optimizers trained {len(TASKS)} small tasks "
        f"with {len(FAULTS)} faults, each in 5 % of the steps. Without a control {shares['none'][2]} of "
        f"{len(values['none'])} runs died, and {shares['none'][1]} ended more than {HURT:.0f} % above the clean loss. "
        f"With the splitter's default {shares['default'][2]} died, {shares['default'][1]} were hurt so much, and "
        f"{shares['default'][0]} ended within {NEAR:.0f} % of the clean loss. `clip_grad_norm_` at 1 lost "
        f"{shares['clip 1'][2]}. Skipped steps lost {shares['skip'][2]}, and {shares['skip'][1]} were hurt. Not met: "
        f"without any fault the default costs SGD {clean['text']:.1f} % on text and {clean['detection']:.1f} % on "
        f"detection. With faults in 20 % of the steps {_counted(often)[1]} of {len(often)} runs with the "
        "default are hurt.\n"
    )


def _totals_words(runs: Runs) -> str:
    """How many runs with the default die or are hurt, and which."""
    dead, parts = 0, []
    for rate in sorted(SEEDS):
        values = _every(runs, "default", rate)
        hurt: dict[str, list[float]] = defaultdict(list)
        for task, optimizer, fault in product(TASKS, OPTIMIZERS, FAULTS):
            found = excess(runs, task, optimizer, "default", fault, rate, SEEDS[rate])
            dead += sum(map(math.isinf, found))
            hurt[f"{optimizer} on {task}"] += [value for value in found if HURT < value < math.inf]
        who = [f"{name} by {min(v):.0f} to {max(v):.0f} %" for name, v in hurt.items() if v]
        count = _counted(values)[1]
        said = f" ({', '.join(who)})" if who else ""
        parts.append(f"- {count} of {len(values)} with faults in {100 * float(rate):.0f} % of the steps{said}\n")
    return (
        f"With the default {dead or 'no'} run{'s' if dead > 1 else ''} died. These ended more than {HURT:.0f} % above "
        f"a clean one:\n\n{''.join(parts)}"
    )


def _beyond(runs: Runs, rate: str) -> str:
    """How many medians with the default are near the clean run, and which are not."""
    far: dict[tuple[str, str], list[str]] = defaultdict(list)
    count = 0
    for optimizer, task, fault in product(OPTIMIZERS, TASKS, FAULTS):
        values = excess(runs, task, optimizer, "default", fault, rate)
        count += bool(values)
        if values and statistics.median(values) > NEAR:
            far[optimizer, task].append(fault)
    who = [f"{o} on {task} ({', '.join(f) if len(f) < len(FAULTS) else 'all'})" for (o, task), f in far.items()]
    return (
        f"Of {count} medians with the default {count - sum(map(len, far.values()))} are at most {NEAR:.0f} % above the "
        f"clean run. The others: {'; '.join(who)}.\n"
    )


def _totals(runs: Runs, control: str, rate: str) -> list[str]:
    """Over all faults of both tasks: how many runs end near a clean one, are hurt, or die; and their median."""
    values = _every(runs, control, rate)
    if not values:
        return ["-"] * (1 + len(TOTALS))
    near, hurt, dead = _counted(values)
    share = [_percent(count, values) for count in (near, hurt, dead)]
    return [str(len(values)), *share, f"{statistics.median(values):+.1f}" if dead * 2 < len(values) else "dead"]


TASKS_OF_RULES = {
    "text, clean": (0.3,),
    "detection, clean": (0.03,),
    "exploding detection": (0.03, 0.1, 0.3),
    "hot stack": (0.1, 1.0),
    "GPT": (0.1, 0.3, 1.0),
}
LONGER = {
    "text, 800 steps, clean": (0.3,),
    "detection, 800 steps, clean": (0.03,),
    "detection, 2000 steps, clean": (0.03,),
}


def _rules(runs: Runs) -> tuple[str, str, dict[str, list[float | None]]]:
    """Other bounds in front of SGD, at 200 steps and on longer runs: clean runs in per cent above none, means."""
    rows = [json.loads(line) for line in BOUNDS.read_text(encoding="utf8").splitlines()]
    none = {(row["task"], row["seed"]): row["score"] for row in rows if row["rule"] == "none"}
    for (task, optimizer, control, fault, _), losses in runs.items():
        if (optimizer, control, fault) == ("SGD", "none", "clean"):
            none |= {(f"{task}, clean", int(seed)): loss for seed, loss in losses.items()}
    found: dict[tuple[str, str, float], list[float | None]] = defaultdict(list)
    for row in rows:
        score = row["score"]
        if row["task"].endswith("clean") and score is not None:
            score = round(100 * (score / none[row["task"], row["seed"]] - 1), 4)
        if row["rule"] != "none":
            found[row["rule"], row["task"], row["lr"]].append(score)
    names = dict.fromkeys(rule for rule, *_ in found)
    made = [
        table(["rule", *tasks], [[rule, *(_of_rule(found, rule, *one) for one in tasks.items())] for rule in rules])
        for tasks, rules in ((TASKS_OF_RULES, names), (LONGER, ("3 %", "30 %")))
    ]
    return made[0], made[1], {" / ".join(map(str, key)): values for key, values in found.items()}


def _of_rule(
    found: Mapping[tuple[str, str, float], list[float | None]], rule: str, task: str, lrs: tuple[float, ...]
) -> str:
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
    return ", ".join(cells)


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
    made, numbers = make()
    (FOLDER / "summary.json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf8")
    for page in PAGES:
        page.write_text(tables.filled(page.read_text(encoding="utf8"), made), encoding="utf8")


if __name__ == "__main__":
    main()
