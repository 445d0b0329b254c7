"""The one table: from the runs of proof.py and gso.py to tables.json, and into docs/results/README.md.

    python benchmarks/proof_page.py            # writes tables.json, the page's tables and its picture

A row is a workload, a column a method. "best" is the cell that the choosing seed prefers, scored on fresh seeds.
"usual" is the rate that the method's authors give, on the choosing seed. For GSO both are its default.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import proof
from benchmarks.proof_picture import draw
from benchmarks.tables import filled, table, with_range
from gradsplit.lab import workload

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "README.md"
PICTURE = ROOT / "docs" / "results" / "behind.svg"
GSO_RUNS = ROOT / "benchmarks" / "results" / "gso" / "runs.jsonl"
EVIDENCE = "benchmarks/results/proof/tables.json"
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


def own_rows(schedule: str = "linear") -> list[Row]:
    """One row per case of proof.py that has runs of GSO on fresh seeds and of another method."""
    finished, rows = proof.done(), []
    for name, case in proof.CASES.items():
        about = workload(case.workload)
        methods = {}
        for method in COLUMNS:
            held = proof.tried(finished, name, method, schedule)
            sound = {lr: run for lr, run in held.items() if run["score"] is not None and not run["diverged"]}
            usual = sound.get(proof.RATES[method][0])
            if not held or (method == "gso" and usual is None):
                continue
            pick = max if about.higher_is_better else min
            best = (
                proof.RATES["gso"][0]
                if method == "gso"
                else pick(sound, key=lambda lr: sound[lr]["score"], default=None)
            )
            keys = [] if best is None else [case.job(method, best, seed, schedule).key for seed in proof.FRESH]
            methods[method] = {
                "lr": best,
                "rates": len(held),
                "choosing": None if best is None else sound[best]["score"],
                "fresh": _spread(finished[key] for key in keys if key in finished),
                "usual": usual and usual["score"],
                "cpu_ms_a_step": statistics.median(run["cpu_ms_a_step"] for run in held.values()),
                "state_per_weight": next(iter(held.values()))["state_per_weight"],
            }
        if methods.get("gso", {}).get("fresh") and len(methods) > 1:
            made = {"workload": case.title, "metric": about.metric, "higher_is_better": about.higher_is_better}
            rows.append(ranked(made | {"steps": case.steps, "source": "proof", "schedule": schedule}, methods))
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


def their_rows(but: Iterable[str] = ()) -> list[Row]:
    """One row per task of gso.py that the optimizer as shipped has run, faults, other settings and `but` left out."""
    held = [json.loads(line) for line in GSO_RUNS.read_text(encoding="utf8").splitlines()]
    held = [run for run in held if run["schedule"] == "linear" and not run["fault"]]
    rows, left_out = [], set(but)
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
        if "gso" in methods and len(methods) > 1 and title not in left_out:
            made = {"workload": title, "metric": here[0]["metric"], "higher_is_better": higher, "steps": steps}
            rows.append(ranked(made | {"source": "gso", "schedule": "linear"}, methods))
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


def ranked(row: Row, methods: dict[str, Row]) -> Row:
    """A row with GSO's rank, and how it stands beside the best other method, as a share of that one's score.

    GSO is compared with each method on seeds that both have: the fresh ones, else the one that chose. `margin` is
    above 0 where GSO is better; `ahead_on` counts the shared fresh seeds on which it is.
    """
    higher = row["higher_is_better"]
    pairs = {m: _pair(methods["gso"], entry, higher) for m, entry in methods.items() if m != "gso"}
    held = {m: pair for m, pair in pairs.items() if pair is not None}
    others = [m for m, entry in methods.items() if m != "gso" and entry["choosing"] is not None]
    row = row | {"methods": methods, "first": None, "rank": None, "of": 1 + len(held), "best_other": None,
                 "margin": None, "ahead_on": 0, "shared": 0}  # fmt: skip
    if methods["gso"].get("lost") and others:  # behind all that ended
        return row | {"rank": 1 + len(others), "of": 1 + len(others), "margin": -1.0}
    if not held:
        return row
    best = min(held, key=lambda m: held[m]["margin"])
    behind = sum(pair["margin"] < 0 for pair in held.values())
    return row | {"first": best if behind else "gso", "rank": 1 + behind, "best_other": best, **held[best]}


def _pair(ours: Row, theirs: Row, higher: bool) -> Row | None:
    """The margin on the same seeds; where there are none, of what each has."""
    fresh = [entry["fresh"]["scores"] if entry["fresh"] else {} for entry in (ours, theirs)]
    seeds = sorted(fresh[0].keys() & fresh[1].keys())
    if seeds:
        mine, other = (statistics.median(scores[seed] for seed in seeds) for scores in fresh)
    elif ours["choosing"] is not None and theirs["choosing"] is not None:
        mine, other = ours["choosing"], theirs["choosing"]
    else:
        mine, other = (entry["fresh"]["median"] if entry["fresh"] else entry["choosing"] for entry in (ours, theirs))
        if mine is None or other is None:
            return None
    margin = (mine - other if higher else other - mine) / abs(other)
    ahead = sum(_better(higher, fresh[0][seed], fresh[1][seed]) for seed in seeds)
    return {"margin": margin, "ahead_on": ahead, "shared": len(seeds)}


# ---- sensitivity, outputs, strategies, sizes


def sensitivity() -> list[Row]:
    """Wortsman et al. 2023: the mean over rates of min(loss, first loss) - best loss, at `AROUND` x the usual rate."""
    finished, rows = proof.done(), []
    for size, options in proof.SIZES.items():
        for method in proof.SENSITIVE:
            usual = proof.RATES[method][0]
            keys = [_sensitive_key(method, usual * factor, options) for factor in proof.AROUND]
            runs = [finished[key] for key in keys if key in finished]
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


def outputs() -> list[Row]:
    """The mean log of the partition function over the steps, where nothing decays."""
    finished = proof.done()
    names = ("method", "lr", "score", "log_partition_over_steps")
    return [
        {name: finished[job.key][name] for name in names} for job in proof.GROUPS["outputs"]() if job.key in finished
    ]


def strategies() -> list[Row]:
    """GSO with other plans on the two cases in which one part explodes."""
    finished, rows = proof.done(), []
    for name, steps, options in proof.HOT_PARTS:
        row: Row = {"workload": name, "options": options, "plans": {}}
        for method in proof.PLANS:
            keys = [proof.Job(name, steps, method, 0.03, seed, options).key for seed in proof.FRESH]
            row["plans"][method] = _spread(finished[key] for key in keys if key in finished)
        if any(row["plans"].values()):
            rows.append(row)
    return rows


def sizes() -> list[Row]:
    """The larger GPTs: each method at its best rate."""
    finished, rows = proof.done(), []
    for size, (steps, _) in proof.LARGE.items():
        best: dict[str, Row] = {}
        for job in proof.large(size):
            run = finished.get(job.key)
            if run is None or run["score"] is None or run["diverged"]:
                continue
            if job.method not in best or run["score"] < best[job.method]["score"]:
                names = ("lr", "score", "cpu_ms_a_step", "state_per_weight", "parameters")
                best[job.method] = {name: run[name] for name in names}
        if best:
            parameters = next(iter(best.values()))["parameters"]
            rows.append({"size": size, "steps": steps, "parameters": parameters, "methods": best})
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
    return table(["workload", *(f"{t} {proof.RATES[m][0]:g}" for m, t in names.items())], lines, EVIDENCE)


def cost_table(rows: list[Row]) -> str:
    """Processor time per step and memory."""
    names = {m: t for m, t in COLUMNS.items() if any(r["methods"].get(m) for r in rows)}
    lines = []
    for row in rows:
        found = {m: row["methods"][m] for m in names if m in row["methods"]}
        cells = {m: f"{e['cpu_ms_a_step']:.1f} ms, {e['state_per_weight']:.1f} x" for m, e in found.items()}
        lines.append([row["workload"], *(cells.get(m, "") for m in names)])
    return table(["workload", *names.values()], lines, EVIDENCE)


def _over_rates(rows: list[Row], name: str) -> str:
    """A number of each run of the sensitivity over the rate."""
    lines = []
    for row in rows:
        shown = ["lost" if value is None else f"{value:.1f}" for value in row[name]]
        lines.append([f"{row['size']}, {COLUMNS[row['method']]}", *shown])
    return table(["parameters, method", *_factors()], lines, EVIDENCE) if lines else ""


def _factors() -> list[str]:
    return [f"x {factor:.2g}" for factor in proof.AROUND]


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
    for plan, words in PLAN_WORDS.items():
        made = [row["plans"].get(plan) for row in rows]
        lines.append([words, *("" if found is None else with_range(list(found["scores"].values())) for found in made)])
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


def count_of(rows: list[Row]) -> Row:
    """In how many rows GSO is first, or within 2 %."""
    held = [row for row in rows if row["rank"] is not None]
    near = [row for row in held if row["margin"] >= -NEAR]
    wide = [row for row in held if row["of"] >= 4]
    single = [row for row in held if not row["methods"]["gso"]["fresh"] and not row["methods"]["gso"].get("lost")]
    unclear = [row for row in held if 0 < row["ahead_on"] < row["shared"]]
    return {
        "one_seed": len(single),
        "wide": len(wide),
        "wide_first": sum(row["rank"] == 1 for row in wide),
        "wide_near": sum(row in near for row in wide),
        "rows": len(held),
        "first": sum(row["rank"] == 1 for row in held),
        "first_or_near": len(near),
        "share": len(near) / max(len(held), 1),
        "not_near": [row["workload"] for row in held if row not in near],
        "unclear": len(unclear),
        "ahead_on_all": sum(row["shared"] >= 2 and row["ahead_on"] == row["shared"] for row in held),
        "behind_on_all": sum(row["shared"] >= 2 and row["ahead_on"] == 0 for row in held),
    }


def count_words(count: Row) -> str:
    """What the table says about the aim."""
    behind = f" Further behind: {'; '.join(count['not_near'])}." if count["not_near"] else ""
    single = (
        f"\nIn {count['one_seed']} rows GSO has one seed, the one that chose. A difference of a few per cent may turn "
        "there.\n"
    )
    return (
        f"GSO is first in {count['first']} of {count['rows']} rows, and first or within 2 % of the first in "
        f"{count['first_or_near']} of them ({100 * count['share']:.0f} %; the aim was 80 %).{behind}\n\n"
        f"On every shared seed GSO is ahead of the best other method in {count['ahead_on_all']} rows, and behind it in "
        f"{count['behind_on_all']}. In {count['unclear']} rows the seeds do not agree.\n\n"
        f"Where few others have run, it is easy to be first. In the {count['wide']} rows with at least three others "
        f"GSO is first in {count['wide_first']}, and first or within 2 % in {count['wide_near']}.\n"
        + (single if count["one_seed"] else "")
    )


def numbers() -> Row:
    """All that the page holds, from the runs."""
    own = own_rows()
    rows = [*own, *their_rows(but=[row["workload"] for row in own])]
    return {
        "count": count_of(rows),
        "rows": rows,
        "cosine": own_rows("cosine"),
        "usual_rates": {method: rates[0] for method, rates in proof.RATES.items()},
        "around": list(proof.AROUND),
        "sensitivity": sensitivity(),
        "outputs": outputs(),
        "strategies": strategies(),
        "sizes": sizes(),
        "failed": len(proof.FAILED.read_text(encoding="utf8").splitlines()) if proof.FAILED.is_file() else 0,
    }


def parts(made: Row) -> dict[str, str]:
    """What stands between the marks of the page."""
    own = [row for row in made["rows"] if row["source"] == "proof"]
    return {
        "main": main_table(made["rows"]),
        "count": count_words(made["count"]),
        "cosine": main_table(made["cosine"]),
        "usual": usual_table(own),
        "costs": cost_table(own),
        "sensitivity": sensitivity_table(made["sensitivity"]),
        "attention": _over_rates(made["sensitivity"], "attention"),
        "partition": _over_rates(made["sensitivity"], "log_partition"),
        "outputs": outputs_table(made["outputs"]),
        "strategies": strategies_table(made["strategies"]),
        "sizes": sizes_table(made["sizes"]),
    }


def main() -> None:
    """Write the numbers, the page's tables and the picture."""
    made = numbers()
    proof.TABLES.write_text(json.dumps(made, indent=1) + "\n", encoding="utf8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf8"), parts(made)), encoding="utf8")
    PICTURE.write_text(draw(made["rows"], COLUMNS), encoding="utf8")
    print(json.dumps(made["count"], indent=1))


if __name__ == "__main__":
    main()
