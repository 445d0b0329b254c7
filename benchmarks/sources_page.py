"""Writes docs/results/sources.md from the raw results of benchmarks/sources.py.

Run: python benchmarks/sources_page.py
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sources_together import CHOOSING, METHODS
from benchmarks.sources_together import TASKS as TOGETHER
from benchmarks.tables import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sources"
PAGE = ROOT / "docs" / "results" / "sources.md"

HEAD = """# Sources, measured

## In short

{in_short}

[The guide](../sources.md) says what splitting by sample and by loss term is.

## Run it again

```bash
python benchmarks/sources.py                # every task below; `--task NAME` for one
python benchmarks/sources_together.py       # alone and together
python benchmarks/sources_cost.py           # the time of a step
python benchmarks/sources_page.py           # writes this page from the raw results
```

Every method with a strength was tuned on two seeds of its own. A table shows the median of five fresh seeds at the
best strength, with the smallest and the largest. A run that diverged counts as the worst. The optimizer, the learning
rate and the number of steps are the task's, the same for all methods.

**On this page**:

{places}

"""
WHERE = "Where it loses, and what was not measured"
NOTES = f"""## {WHERE}

- Outliers in x: a global clip that was tuned is as good as `SampleSplitter`.
- Burgers: a tuned weight is better than `TermSplitter`, which is better than the plain sum.
- Helmholtz on the square: a tuned weight is better than `TermSplitter` in 1,000 steps; see the table of weights.
- Annealing and GradNorm are our own short programs after the papers. The peer is `torchjd` 0.18.0 from PyPI.
- Every task has one learning rate, and the models are small. Nothing here speaks about larger ones.
"""
TITLES = {
    "outliers-in-x": "Outliers in x",
    "outliers-in-y": "Outliers in y",
    "healthy-regression": "Regression without a fault",
    "digits-blank": "Blank digits",
    "digits-blank-batchnorm": "Blank digits, BatchNorm",
    "digits-healthy": "Digits without a fault",
    "digits-healthy-batchnorm": "Digits without a fault, BatchNorm",
    "helmholtz-1d": "Helmholtz on a line",
    "helmholtz-2d": "Helmholtz on a square",
    "burgers": "Burgers",
}
# What each table is about, in a sentence; a task without a file of results is left out.
TASKS = {
    "outliers-in-x": "Friedman's function; in 5 % of the training rows x is 30 times too large. RMSE on clean rows.",
    "outliers-in-y": "The same; in 5 % of the rows y is off by 15 standard deviations. RMSE on clean rows.",
    "healthy-regression": "The same without a fault: what the splitter costs.",
    "digits-blank": "Digits; 2 % of the images are blank, and standardising in the model makes them 0 / 0. Accuracy.",
    "digits-blank-batchnorm": "The same with BatchNorm. Accuracy.",
    "digits-healthy": "Digits without a fault: what the splitter costs. Accuracy.",
    "digits-healthy-batchnorm": "The same with BatchNorm. Accuracy.",
    "helmholtz-1d": "A network solves u'' + u = f on a line. Relative error.",
    "helmholtz-2d": "The same on a square. Relative error.",
    "burgers": "Burgers' equation with nu = 0.02 / pi. Relative error.",
}
NAMES = {
    "none": "nothing",
    "samples": "**`SampleSplitter`**",
    "terms": "**`TermSplitter`**",
    "clip": "global clip, tuned",
    "huber": "Huber loss, tuned",
    "masked loss": "rows of the loss that are not finite left out",
    "tuned weight": "weight of the boundary, tuned",
    "annealing": "Wang annealing",
    "gradnorm": "GradNorm",
    "torchjd UPGrad": "torchjd, UPGrad",
}


def _cells(scores: list[float | None], *, more_is_better: bool) -> tuple[str, str]:
    """Median and range as two cells; a diverged run is the worst value of its side."""
    worst = float("-inf") if more_is_better else float("inf")
    ordered = sorted(worst if score is None else score for score in scores)
    shown = [f"{value:.4f}" if abs(value) != float("inf") else "diverged" for value in ordered]
    return shown[len(shown) // 2], f"{shown[0]} to {shown[-1]}"


def in_short(results: Path = RESULTS) -> str:
    """What was asked and what came out, in one paragraph."""

    def score(task: str, method: str) -> str:
        found = json.loads((results / f"{task}.json").read_text(encoding="utf8"))
        return _cells(found["fresh"][method]["score"], more_is_better="accuracy" in found["about"]["task"])[0]

    costs = json.loads((results / "cost.json").read_text(encoding="utf8"))["ratio"]
    over = [statistics.median(ratios) for ratios in costs.values()]
    return (
        "Does it help to bound samples and loss terms, beside the usual remedies? With blank images in front of "
        f"BatchNorm, `SampleSplitter` reaches an accuracy of {score('digits-blank-batchnorm', 'samples')}; without it "
        f"the net ends at {score('digits-blank-batchnorm', 'none')}. With outliers in y its error is "
        f"{score('outliers-in-y', 'samples')}, that of a tuned Huber loss {score('outliers-in-y', 'huber')}. On the "
        f"Helmholtz equation `TermSplitter` has an error of {score('helmholtz-1d', 'terms')} on a line, and a tuned "
        f"weight {score('helmholtz-1d', 'tuned weight')}. A step takes {min(over):.2f} to {max(over):.2f} times as "
        f"long. Not met: on the square a tuned weight is better ({score('helmholtz-2d', 'tuned weight')} beside "
        f"{score('helmholtz-2d', 'terms')}), and on Burgers' equation too ({score('burgers', 'tuned weight')} beside "
        f"{score('burgers', 'terms')})."
    )


def _section(name: str, kept: dict[str, Any]) -> str:
    about = kept["about"]
    more = "accuracy" in about["task"]
    evidence = f"benchmarks/results/sources/{name}.json"
    text = f"## {TITLES[name]}\n\n{TASKS[name]} Five seeds, {about['machine']}, {about['date']}.\n\n"
    rows = []
    for method, found in kept["fresh"].items():
        strength = "" if found["strength"] == "None" else f" (`{found['strength']}`)"
        rows.append([NAMES[method] + strength, *_cells(found["score"], more_is_better=more)])
    text += table(["method", "median", "range"], rows, evidence) + "\n"
    named = kept["fresh"].get("samples", {})
    if "precision" in named:
        precision, recall = (statistics.median(named[key]) for key in ("precision", "recall"))
        row = ["median of the five runs", f"{precision:.3f}", f"{recall:.3f}"]
        text += table(["the bad samples named", "precision", "recall"], [row], evidence) + "\n"
    return text


def _why(runs: list[dict[str, Any]]) -> str:
    """Other weights, more steps and more seeds on the square."""
    scores: dict[tuple[float | None, int], dict[int, float]] = {}
    for run in runs:
        scores.setdefault((run["weight"], run["steps"]), {})[run["seed"]] = run["score"]
    tuned, lines = scores[100.0, 1000], []
    for (weight, steps), found in sorted(scores.items(), key=lambda one: (one[0][1], one[0][0] or 0.0)):
        name = NAMES["terms"] if weight is None else f"weight {weight:g}"
        worse = "" if found is tuned else f"{sum(found[s] > tuned[s] for s in found)} of {len(found)}"
        median = f"{statistics.median_low(found.values()):.4f}"
        lines.append([name, f"{steps:,}", str(len(found)), median, worse])
    names = ["method", "steps", "seeds", "lower median", "worse than weight 100 in 1,000 steps, same seed"]
    text = (
        "## Why the square is harder\n\nThe square again, seeds from 5 on, AMD EPYC, 2 cores, 2026-11-30. Command: "
        "`python benchmarks/sources.py --task why`. With `TermSplitter` the ratio of the two scales is the weight. At "
        "step 250, when the gradient of the equation is largest, it is above 190 in most runs. At the end it is mostly "
        "below 130 (raw: [weights](../../benchmarks/results/sources/helmholtz-2d-weights.json)). So the equation is "
        "solved later than with a weight of 100, which is also the best of 30, 100 and 200.\n\n"
    )
    return text + table(names, lines, "benchmarks/results/sources/helmholtz-2d-why.jsonl") + "\n"


def _together(runs: list[dict[str, Any]]) -> str:
    """What the three give alone and together; the seed that chose the rate is left out."""
    head, seeds = runs[0], sorted({run["seed"] for run in runs} - {CHOOSING})
    text = (
        "## Alone and together\n\nThe exploding detector (score, more is better) and the text GPT (validation loss, "
        "less is better); in the third 5 % of the sequences are random characters. AdamW has the best of three rates, "
        "without a clip or warm-up; GSO has nothing chosen. Command: `python benchmarks/sources_together.py`. "
        f"Seeds {', '.join(map(str, seeds))}, {head['hardware']}, {head['date'][:10]}.\n\n"
    )
    lines = []
    for task in TOGETHER:
        more_is_better = TOGETHER[task][0] == "detection"
        for method in METHODS:
            rows = [run for run in runs if (run["task"], run["method"]) == (task, method) and run["seed"] in seeds]
            if rows:
                cells = _cells([row["score"] for row in rows], more_is_better=more_is_better)
                seconds = statistics.median(row["cpu_seconds"] for row in rows)
                lines.append([task, method, *cells, f"{seconds:.1f}"])
    names = ["task", "method", "median", "range", "processor seconds"]
    return text + table(names, lines, "benchmarks/results/sources/together.jsonl") + "\n"


def _titles(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def write_page(results: Path = RESULTS, page: Path = PAGE) -> None:
    """The page of all tasks that have results."""
    text = ""
    for name in TASKS:
        file = results / f"{name}.json"
        kept = json.loads(file.read_text(encoding="utf8")) if file.exists() else {"fresh": {}}
        if kept["fresh"]:
            text += _section(name, kept)
    file = results / "helmholtz-2d-why.jsonl"
    if file.exists():
        text += _why([json.loads(line) for line in file.read_text(encoding="utf8").splitlines()])
    file = results / "cost.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf8"))
        about = kept["about"]
        text += "## Time of a step\n\n"
        text += f"Over the same step without, {about['machine']}, {about['date']}, four times 100 runs.\n\n"
        text += f"{about['note']}\n\n" if "note" in about else ""
        rows = [[step, f"{statistics.median(ratios):.2f}"] for step, ratios in kept["ratio"].items()]
        text += table(["step", "median"], rows, "benchmarks/results/sources/cost.json") + "\n"
    file = results / "together.jsonl"
    if file.exists():
        text += _together([json.loads(line) for line in file.read_text(encoding="utf8").splitlines()])
    page.parent.mkdir(parents=True, exist_ok=True)
    text += NOTES
    places = [f"- [{title}](#{re.sub('[^a-z -]', '', title.lower()).replace(' ', '-')})" for title in _titles(text)]
    head = HEAD.format(in_short=in_short(results), places="\n".join(places))
    page.write_text(head + text, encoding="utf8")


if __name__ == "__main__":
    write_page()
