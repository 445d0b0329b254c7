"""The one table: from the runs of proof.py and gso.py to tables.json, and into docs/results/README.md.

    python benchmarks/proof_page.py            # writes both; what has not been run is a dash

A row is a workload, a column a method. "best" is the cell that the choosing seed prefers, scored on fresh seeds.
"usual" is the rate that the method's authors give, on the choosing seed. For GSO both are its default.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import proof
from gradsplit.lab import workload

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "README.md"
GSO_RUNS = ROOT / "benchmarks" / "results" / "gso" / "runs.jsonl"
COLUMNS = {
    "gso": "GSO",
    "adamw+clip1+warmup": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "schedulefree": "schedule-free",
    "lion": "Lion",
    "prodigy": "Prodigy",
    "lamb": "LAMB",
}
NEAR = 0.02  # of the first

Row = dict[str, Any]


def _spread(rows: Iterable[Mapping[str, Any]]) -> Row | None:
    """Median, least and greatest score, and the seeds; a run that was lost has none."""
    held = [row for row in rows if row["score"] is not None and not row["diverged"]]
    if not held:
        return None
    scores = [row["score"] for row in held]
    return {
        "median": statistics.median(scores),
        "min": min(scores),
        "max": max(scores),
        "seeds": sorted(row["seed"] for row in held),
        "scores": {str(row["seed"]): row["score"] for row in held},
    }


def _better(higher: bool, a: float, b: float) -> bool:
    return a > b if higher else a < b


# ---- rows of proof.py


def own_rows() -> list[Row]:
    """One row per workload of `proof.TASKS` that has runs of GSO."""
    finished = proof.done()
    rows = []
    for name, (steps, options) in proof.TASKS.items():
        about = workload(name)
        methods = {}
        for method in COLUMNS:
            same = [
                run
                for run in finished.values()
                if (run["workload"], run["steps"], run["method"]) == (name, steps, method)
            ]
            tried = [run for run in same if run["seed"] == proof.CHOOSING and run["options"] == options]
            if not tried:
                continue
            sound = [run for run in tried if run["score"] is not None and not run["diverged"]]
            usual = next((run for run in tried if run["lr"] == proof.RATES[method][0]), None)
            chosen = usual if method == "gso" else None
            if chosen is None and sound:
                chosen = (max if about.higher_is_better else min)(sound, key=lambda run: run["score"])
            fresh = [] if chosen is None else [
                finished[key]
                for seed in proof.FRESH
                if (key := proof.Job(name, steps, method, chosen["lr"], seed, options).key) in finished
            ]  # fmt: skip
            methods[method] = {
                "lr": chosen and chosen["lr"],
                "rates": len(tried),
                "choosing": chosen and chosen["score"],
                "fresh": _spread(fresh),
                "usual": usual and usual["score"],
                "cpu_ms_a_step": statistics.median(run["cpu_ms_a_step"] for run in tried),
                "state_per_weight": tried[0]["state_per_weight"],
            }
        if "gso" in methods:
            rows.append(_ranked(name, about.metric, about.higher_is_better, steps, "proof", methods))
    return rows


# ---- rows of gso.py

THEIRS = (
    ("GPT", "gpt", 1000, {}),
    ("GPT, second text", "gpt", 1000, {"text": "second"}),
    ("LSTM", "lstm", 500, {}),
    ("detector, exploding", "detection", 500, {}),
    ("detector, healthy", "detection", 500, {"healthy": True}),
    ("photographs", "aerial", 500, {}),
    ("hot residual stack", "residual-stack", 900, {}),
    ("cool residual stack", "residual-stack", 900, {"gain": 0.5}),
    ("residual stack, gain 1", "residual-stack", 900, {"gain": 1.0}),
    ("residual stack, gain 2", "residual-stack", 900, {"gain": 2.0}),
    ("plain stack, 12 layers", "plain-stack", 350, {}),
    ("plain stack, 36 layers", "plain-stack", 350, {"depth": 36}),
    ("plain stack, 146 layers", "deep-stack", 300, {}),
    ("GPT, 12 layers", "gpt", 300, {"layers": 12, "width": 48}),
    ("GPT, 24 layers", "gpt", 300, {"layers": 24, "width": 48}),
    ("GPT, projections at zero", "gpt", 500, {"zero": True}),
    ("mixer, small data", "mixer", 600, {}),
    ("LoRA of rank 4", "lora", 400, {}),
)
THEIR_NAMES = {"adamw": "adamw+clip1+warmup"}
HIGHER = {"gpt": False, "lstm": False, "lora": False}


def their_rows() -> list[Row]:
    """One row per task of gso.py that the optimizer as shipped has run, faults and other settings left out."""
    held = [json.loads(line) for line in GSO_RUNS.read_text(encoding="utf8").splitlines()]
    held = [run for run in held if run["schedule"] == "linear" and not run["fault"]]
    rows = []
    for title, task, steps, options in THEIRS:
        here = [run for run in held if (run["task"], run["steps"], run["options"]) == (task, steps, options)]
        higher = HIGHER.get(task, True)
        methods = {}
        for method in ("gso", "adamw", "muon", "soap", "schedulefree", "prodigy", "lamb"):
            cells: dict[tuple[float, str], list[Row]] = {}
            for run in here:
                if run["method"] == method and (method != "gso" or (run["lr"] == 0.03 and not run["method_options"])):
                    cells.setdefault((run["lr"], json.dumps(run["method_options"])), []).append(run)
            if not cells:
                continue
            chosen = _chosen(cells, higher)
            fresh = [run for run in cells[chosen] if run["seed"] >= 10]
            choosing = [run for run in cells[chosen] if run["seed"] == 0]
            methods[THEIR_NAMES.get(method, method)] = {
                "lr": chosen[0],
                "rates": len(cells),
                "choosing": choosing[0]["score"] if choosing else None,
                "fresh": _spread(fresh),
                "usual": None,
                "lost": bool(fresh) and _spread(fresh) is None,
            }
        if "gso" in methods and len(methods) > 1:
            metric = next(run["metric"] for run in here)
            rows.append(_ranked(title, metric, higher, steps, "gso", methods))
    return rows


def _chosen(cells: Mapping[tuple[float, str], list[Row]], higher: bool) -> tuple[float, str]:
    """The cell that seed 0 prefers."""
    best, best_score = next(iter(cells)), None
    for cell, runs in cells.items():
        for run in runs:
            if run["seed"] != 0 or run["score"] is None or run["diverged"]:
                continue
            if best_score is None or _better(higher, run["score"], best_score):
                best, best_score = cell, run["score"]
    return best


# ---- ranks


def _ranked(name: str, metric: str, higher: bool, steps: int, source: str, methods: dict[str, Row]) -> Row:
    """A row with GSO's rank at the others' best, and how far it is behind the first, in shares of that one's score.

    GSO is compared with each method on seeds that both have: the fresh ones, else the one that chose.
    """
    pairs = {m: _pair(methods["gso"], entry) for m, entry in methods.items() if m != "gso"}
    held = {m: pair for m, pair in pairs.items() if pair is not None}
    others = [m for m, entry in methods.items() if m != "gso" and entry["choosing"] is not None]
    row = {"workload": name, "metric": metric, "higher_is_better": higher, "steps": steps, "source": source,
           "methods": methods, "first": None, "rank": None, "of": 1 + len(held), "behind": None}  # fmt: skip
    if methods["gso"].get("lost") and others:  # behind all that ended
        return row | {"rank": 1 + len(others), "of": 1 + len(others), "behind": 1.0}
    if not held:
        return row
    ahead = {m: abs(theirs - ours) / abs(theirs) for m, (ours, theirs) in held.items() if _better(higher, theirs, ours)}
    first = max(ahead, key=lambda m: ahead[m]) if ahead else "gso"
    return row | {"first": first, "rank": 1 + len(ahead), "behind": max(ahead.values(), default=0.0)}


def _pair(ours: Row, theirs: Row) -> tuple[float, float] | None:
    """Two scores on the same seeds; where there are none, what each has."""
    held = [entry["fresh"]["scores"] if entry["fresh"] else {} for entry in (ours, theirs)]
    shared = sorted(held[0].keys() & held[1].keys())
    if shared:
        mine, other = (statistics.median(scores[seed] for seed in shared) for scores in held)
        return mine, other
    if ours["choosing"] is not None and theirs["choosing"] is not None:
        return ours["choosing"], theirs["choosing"]
    mixed = [entry["fresh"]["median"] if entry["fresh"] else entry["choosing"] for entry in (ours, theirs)]
    return None if None in mixed else (mixed[0], mixed[1])


# ---- sensitivity, strategies, sizes


def sensitivity() -> list[Row]:
    """Wortsman et al. 2023: the mean over rates of min(loss, first loss) - best loss, at `AROUND` x the usual rate."""
    finished, rows = proof.done(), []
    for size, options in proof.SIZES.items():
        for method in proof.SENSITIVE:
            usual = proof.RATES[method][0]
            runs = [
                finished[key]
                for factor in proof.AROUND
                if (key := _sensitive_key(method, usual * factor, options)) in finished
            ]
            if len(runs) < len(proof.AROUND):
                continue
            first = max(run["first_loss"] for run in runs)
            losses = [first if run["score"] is None or run["diverged"] else min(run["score"], first) for run in runs]
            rows.append({
                "size": size,
                "method": method,
                "usual": usual,
                "losses": losses,
                "best": min(losses),
                "sensitivity": statistics.fmean(losses) - min(losses),
                "attention": [run.get("largest_attention_logit") for run in runs],
                "log_partition": [run.get("mean_log_partition") for run in runs],
            })  # fmt: skip
    return rows


def _sensitive_key(method: str, lr: float, options: Mapping[str, Any]) -> str:
    return proof.Job("gpt", 200, method, min(lr, proof.METHODS[method].largest_lr), proof.CHOOSING, options).key


def strategies() -> list[Row]:
    """GSO with other plans on the two cases in which one part explodes."""
    finished, rows = proof.done(), []
    for name, steps, options in proof.CASES:
        row: Row = {"workload": name, "options": options, "plans": {}}
        for method in proof.PLANS:
            keys = [proof.Job(name, steps, method, 0.03, seed, options).key for seed in proof.FRESH]
            row["plans"][method] = _spread(finished[key] for key in keys if key in finished)
        if any(row["plans"].values()):
            rows.append(row)
    return rows


def sizes() -> list[Row]:
    """The larger GPTs."""
    finished, rows = proof.done(), []
    for size, (steps, options) in proof.LARGE.items():
        runs = [run for run in finished.values() if run["options"] == dict(options) and run["steps"] == steps]
        if runs:
            methods = {run["method"]: {"lr": run["lr"], "score": run["score"], "cpu_ms_a_step": run["cpu_ms_a_step"],
                                       "state_per_weight": run["state_per_weight"]} for run in runs}  # fmt: skip
            rows.append({"size": size, "steps": steps, "parameters": runs[0]["parameters"], "methods": methods})
    return rows


# ---- words


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
    lines = [
        f"| workload, steps | metric | {' | '.join(COLUMNS.values())} | GSO's rank | behind |",
        "|---|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    for row in rows:
        cells = [_cell(row["methods"].get(m), first=m == row["first"]) for m in COLUMNS]
        arrow = "↑" if row["higher_is_better"] else "↓"
        rank = "" if row["rank"] is None else f"{row['rank']} of {row['of']}"
        behind = "" if row["behind"] is None else "first" if row["rank"] == 1 else f"{100 * row['behind']:.1f} %"
        lines.append(
            f"| {row['workload']}, {row['steps']} | {row['metric'].replace('_', ' ')} {arrow} | {' | '.join(cells)} | "
            f"{rank} | {behind} |"
        )
    return "\n".join(lines) + "\n"


def usual_table(rows: list[Row]) -> str:
    """Every method at the rate that its authors give."""
    names = {m: title for m, title in COLUMNS.items() if any(r["methods"].get(m, {}).get("usual") for r in rows)}
    heads = [f"{title} {proof.RATES[m][0]:g}" for m, title in names.items()]
    lines = [f"| workload | {' | '.join(heads)} |", "|---|" + "---|" * len(names)]
    for row in rows:
        values = {m: row["methods"][m]["usual"] for m in names if row["methods"].get(m)}
        held = [value for value in values.values() if value is not None]
        best = (max if row["higher_is_better"] else min)(held)
        cells = []
        for m in names:
            value = values.get(m)
            cells.append("" if value is None else f"**{value:.3f}**" if value == best else f"{value:.3f}")
        lines.append(f"| {row['workload']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cost_table(rows: list[Row]) -> str:
    """Processor time per step and memory."""
    names = {m: t for m, t in COLUMNS.items() if any(r["methods"].get(m) for r in rows)}
    lines = [f"| workload | {' | '.join(names.values())} |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = []
        for m in names:
            entry = row["methods"].get(m)
            cells.append("" if entry is None else f"{entry['cpu_ms_a_step']:.1f} ms, {entry['state_per_weight']:.1f} x")
        lines.append(f"| {row['workload']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sensitivity_table(rows: list[Row]) -> str:
    """Losses over the rate, and the mean loss above the best."""
    heads = [f"x {factor:.2g}" for factor in proof.AROUND]
    lines = [f"| parameters, method | usual | {' | '.join(heads)} | sensitivity |", "|---|---|" + "---|" * 7]
    lines += [
        f"| {row['size']}, {COLUMNS[row['method']]} | {row['usual']:g} | "
        f"{' | '.join(f'{loss:.2f}' for loss in row['losses'])} | **{row['sensitivity']:.2f}** |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def attention_table(rows: list[Row]) -> str:
    """The largest attention logit over the rate."""
    heads = [f"x {factor:.2g}" for factor in proof.AROUND]
    lines = [f"| parameters, method | {' | '.join(heads)} |", "|---|" + "---|" * 6]
    for row in rows:
        shown = ["lost" if value is None else f"{value:.1f}" for value in row["attention"]]
        lines.append(f"| {row['size']}, {COLUMNS[row['method']]} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


PLAN_WORDS = {
    "gso": "rows (default)",
    "gso-tensors": "tensors",
    "gso-lbf": "L-BF's rectangles",
    "gso-tree": "rows and modules (Tree-SP)",
    "gso-lbf-blocks": "rows; L-BF's rectangles made orthogonal one by one",
}
CASE_WORDS = {"experts": "experts, the first one hot", "detection": "two-tower detector, one tower explodes"}


def strategies_table(rows: list[Row]) -> str:
    """Plans of GSO."""
    heads = [CASE_WORDS[row["workload"]] for row in rows]
    lines = [f"| what is bounded together | {' | '.join(heads)} |", "|---|" + "---|" * len(rows)]
    for plan, words in PLAN_WORDS.items():
        cells = []
        for row in rows:
            made = row["plans"].get(plan)
            cells.append("" if made is None else f"{made['median']:.3f} ({made['min']:.3f} to {made['max']:.3f})")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sizes_table(rows: list[Row]) -> str:
    """The larger GPTs."""
    names = {m: t for m, t in COLUMNS.items() if any(m in row["methods"] for row in rows)}
    lines = [f"| parameters, steps | {' | '.join(names.values())} |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = []
        for m in names:
            run = row["methods"].get(m)
            cells.append("" if run is None else f"{run['score']:.3f} ({run['cpu_ms_a_step']:.0f} ms)")
        lines.append(f"| {row['parameters'] / 1e6:.1f} M, {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def count_of(rows: list[Row]) -> Row:
    """In how many rows GSO is first, or within 2 %."""
    ranked = [row for row in rows if row["rank"] is not None]
    near = [row for row in ranked if row["rank"] == 1 or row["behind"] <= NEAR]
    wide = [row for row in ranked if row["of"] >= 4]
    single = [row for row in ranked if not row["methods"]["gso"]["fresh"] and not row["methods"]["gso"].get("lost")]
    return {
        "one_seed": len(single),
        "wide": len(wide),
        "wide_first": sum(row["rank"] == 1 for row in wide),
        "wide_near": sum(row in near for row in wide),
        "rows": len(ranked),
        "first": sum(row["rank"] == 1 for row in ranked),
        "first_or_near": len(near),
        "share": len(near) / max(len(ranked), 1),
        "not_near": [row["workload"] for row in ranked if row not in near],
    }


def count_words(count: Row) -> str:
    """What the table says about the aim."""
    behind = f" Further behind: {', '.join(count['not_near'])}." if count["not_near"] else ""
    return (
        f"GSO is first in {count['first']} of {count['rows']} rows, and first or within 2 % of the first in "
        f"{count['first_or_near']} of them ({100 * count['share']:.0f} %; the aim was 80 %).{behind}\n\n"
        "Some rows have AdamW alone beside GSO, and there it is easy to be first. "
        f"In the {count['wide']} rows with at least three others GSO is first in {count['wide_first']}, and first or "
        f"within 2 % in {count['wide_near']}.\n\n"
        f"In {count['one_seed']} rows GSO has one seed, the one that chose. A difference of a few per cent may turn "
        "there.\n"
    )


def _filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with every table between its marks replaced; a table without rows leaves a sentence."""
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        if not mark.search(page):
            raise ValueError(f"{PAGE.name}: expected the marks of the table {name}, found none.")
        evidence = "\n<!-- evidence: benchmarks/results/proof/tables.json -->\n\n"
        if "|" in table:
            body = f"{evidence}{table}\n" if table.count("\n") > 2 else "\nNot run yet.\n\n"
        else:
            body = f"\n{table}\n" if table else "\nNot run yet.\n\n"
        page = mark.sub(lambda found, body=body: found[1] + body + found[2], page)
    return page


def main() -> None:
    """Write the numbers, and the page's tables."""
    rows = [*own_rows(), *their_rows()]
    own = [row for row in rows if row["source"] == "proof"]
    made = {
        "count": count_of(rows),
        "rows": rows,
        "usual_rates": {method: rates[0] for method, rates in proof.RATES.items()},
        "around": list(proof.AROUND),
        "sensitivity": sensitivity(),
        "strategies": strategies(),
        "sizes": sizes(),
        "failed": len(proof.FAILED.read_text(encoding="utf8").splitlines()) if proof.FAILED.is_file() else 0,
    }
    proof.TABLES.write_text(json.dumps(made, indent=1) + "\n", encoding="utf8")
    page = PAGE.read_text(encoding="utf8")
    page = _filled(page, {
        "main": main_table(rows),
        "count": count_words(made["count"]),
        "usual": usual_table(own),
        "costs": cost_table(own),
        "sensitivity": sensitivity_table(made["sensitivity"]),
        "attention": attention_table(made["sensitivity"]),
        "strategies": strategies_table(made["strategies"]) if made["strategies"] else "",
        "sizes": sizes_table(made["sizes"]),
    })  # fmt: skip
    PAGE.write_text(page, encoding="utf8")
    print(json.dumps(made["count"], indent=1))


if __name__ == "__main__":
    main()
