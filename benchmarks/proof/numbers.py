"""The numbers of docs/results/README.md, from the runs of proof.py and gso.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.proof import plan, store
from gradsplit.lab import workload

GSO_RUNS = store.RESULTS.parent / "gso" / "runs.jsonl"
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
ENOUGH = 6  # fresh seeds on which a cell counts though another was chosen

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
    finished, rows = store.done(), []
    for name, case in plan.CASES.items():
        about = workload(case.workload)
        methods = {}
        for method in COLUMNS:
            held = plan.tried(finished, name, method, schedule)
            sound = {lr: run for lr, run in held.items() if run["score"] is not None and not run["diverged"]}
            usual = sound.get(plan.RATES[method][0])
            if not held or (method == "gso" and usual is None):
                continue
            pick = max if about.higher_is_better else min
            best = (
                plan.RATES["gso"][0]
                if method == "gso"
                else pick(sound, key=lambda lr: sound[lr]["score"], default=None)
            )
            keys = [] if best is None else [case.job(method, best, seed, schedule).key for seed in plan.FRESH]
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
    lines = [json.loads(line) for line in GSO_RUNS.read_text(encoding="utf8").splitlines()]
    held = {run["key"]: run for run in lines}.values()  # of a run that was made again the later line counts
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
    """The cell that seed 0 prefers, or the mean of those seeds below 10 that all cells have run.

    If cells have run on six fresh seeds or more, the best of those with most seeds, which favours the others.
    """
    fresh = {cell: [run["score"] for run in runs if run["seed"] >= 10] for cell, runs in cells.items()}
    most = max(map(len, fresh.values()))
    if most >= ENOUGH:
        held = {cell: statistics.median(scores) for cell, scores in fresh.items() if len(scores) == most}
        return (max if higher else min)(held, key=lambda cell: held[cell])
    sound = {
        cell: {run["seed"]: run["score"] for run in runs if run["seed"] < 10}
        for cell, runs in cells.items()
        if any(run["seed"] == 0 and run["score"] is not None and not run["diverged"] for run in runs)
    }
    if not sound:
        return next(iter(cells))
    seeds = set.intersection(*(set(scores) for scores in sound.values()))
    means = {cell: statistics.fmean(scores[seed] for seed in seeds) for cell, scores in sound.items()}
    return (max if higher else min)(means, key=lambda cell: means[cell])


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
    finished, rows = store.done(), []
    for size, (steps, _) in plan.SIZES.items():
        for method in plan.SENSITIVE:
            usual = plan.RATES[method][0]
            keys = [plan.sensitive(size, method, factor).key for factor in plan.AROUND]
            runs = [finished[key] for key in keys if key in finished]
            if len(runs) < len(plan.AROUND):
                continue
            first = max(run["first_loss"] for run in runs)
            losses = [first if run["score"] is None or run["diverged"] else min(run["score"], first) for run in runs]
            rows.append({
                "size": size,
                "steps": steps,
                "method": method,
                "usual": usual,
                "losses": losses,
                "best": min(losses),
                "sensitivity": statistics.fmean(losses) - min(losses),
                "attention": [run.get("largest_attention_logit") for run in runs],
                "log_partition": [run.get("mean_log_partition") for run in runs],
            })  # fmt: skip
    return rows


def outputs() -> list[Row]:
    """The mean log of the partition function over the steps, where nothing decays."""
    finished = store.done()
    names = ("method", "lr", "score", "log_partition_over_steps")
    return [
        {name: finished[job.key][name] for name in names} for job in plan.GROUPS["outputs"]() if job.key in finished
    ]


def strategies() -> list[Row]:
    """GSO with other plans on the two cases in which one part explodes."""
    finished, rows = store.done(), []
    for name, steps, options in plan.HOT_PARTS:
        row: Row = {"workload": name, "options": options, "plans": {}}
        for method in plan.PLANS:
            keys = [plan.Job(name, steps, method, 0.03, seed, options).key for seed in plan.FRESH]
            row["plans"][method] = _spread(finished[key] for key in keys if key in finished)
        if any(row["plans"].values()):
            rows.append(row)
    return rows


def photographs() -> Row:
    """Method -> metric -> median and range over the fresh seeds, of the detector on photographs.

    "last_losses": per seed, the mean of the training loss over the last 80 of 500 steps.
    """
    finished, case, made = store.done(), plan.CASES["photographs"], {}
    for method in COLUMNS:
        best = plan.best_rate(finished, "photographs", method)
        keys = [] if best is None else [case.job(method, best, seed).key for seed in plan.FRESH]
        runs = [finished[key] for key in keys if key in finished and not finished[key]["diverged"]]
        if runs:
            made[method] = {"lr": best, "seeds": [run["seed"] for run in runs]} | {
                name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
                for name in ("map50", "map", "test_map50", "test_map")
                for v in [[run["metrics"][name] for run in runs]]
            }
            made[method]["last_losses"] = [statistics.fmean(run["losses"][-4:]) for run in runs]
    return made


def sizes() -> list[Row]:
    """The larger GPTs: each method at its best rate."""
    finished, rows = store.done(), []
    for size, (steps, _) in plan.LARGE.items():
        best: dict[str, Row] = {}
        rates: dict[str, list[float]] = {}
        for job in plan.large(size):
            run = finished.get(job.key)
            if run is None or run["score"] is None or run["diverged"]:
                continue
            rates.setdefault(job.method, []).append(job.lr)
            if job.method not in best or run["score"] < best[job.method]["score"]:
                names = ("lr", "score", "cpu_ms_a_step", "state_per_weight", "parameters")
                best[job.method] = {name: run[name] for name in names}
        if best:
            parameters = next(iter(best.values()))["parameters"]
            made = {"size": size, "steps": steps, "parameters": parameters}
            rows.append(made | {"methods": best, "rates": rates})
    return rows


def short() -> list[Row]:
    """GSO and Muon in as short runs at 1 M as at 3 M."""
    finished = store.done()
    names = ("parameters", "steps", "method", "lr", "score")
    return [{name: finished[job.key][name] for name in names} for job in plan.short() if job.key in finished]


def count_of(rows: list[Row]) -> Row:
    """In how many rows GSO is first, or within 2 %."""
    held = [row for row in rows if row["rank"] is not None]
    near = [row for row in held if row["margin"] >= -NEAR]
    wide = [row for row in held if row["of"] >= 4]
    single = [row for row in held if not row["methods"]["gso"]["fresh"] and not row["methods"]["gso"].get("lost")]
    titles = [plan.CASES[name].title for name in plan.UNSEEN]
    unseen = [row for row in held if row["workload"] in titles]
    full = [row for row in held if row["of"] == len(COLUMNS)]
    unclear = [row for row in held if 0 < row["ahead_on"] < row["shared"]]
    return {
        "one_seed": len(single),
        "unseen": len(unseen),
        "unseen_first": sum(row["rank"] == 1 for row in unseen),
        "unseen_near": sum(row in near for row in unseen),
        "wide": len(wide),
        "wide_first": sum(row["rank"] == 1 for row in wide),
        "wide_near": sum(row in near for row in wide),
        "full": len(full),
        "full_first": sum(row["rank"] == 1 for row in full),
        "full_near": sum(row in near for row in full),
        "rows": len(held),
        "first": sum(row["rank"] == 1 for row in held),
        "first_or_near": len(near),
        "share": len(near) / max(len(held), 1),
        "not_near": [row["workload"] for row in held if row not in near],
        "unclear": len(unclear),
        "ahead_on_all": sum(row["shared"] >= 2 and row["ahead_on"] == row["shared"] for row in held),
        "behind_on_all": sum(row["shared"] >= 2 and row["ahead_on"] == 0 for row in held),
    }


def numbers() -> Row:
    """All that the page holds, from the runs."""
    own = own_rows()
    rows = [*own, *their_rows(but=[row["workload"] for row in own])]
    return {
        "count": count_of(rows),
        "rows": rows,
        "cosine": own_rows("cosine"),
        "usual_rates": {method: rates[0] for method, rates in plan.RATES.items()},
        "around": list(plan.AROUND),
        "costs": json.loads(store.COSTS.read_text(encoding="utf8"))["rows"] if store.COSTS.is_file() else {},
        "photographs": photographs(),
        "sensitivity": sensitivity(),
        "outputs": outputs(),
        "strategies": strategies(),
        "sizes": sizes(),
        "short": short(),
        "failed": len(store.FAILED.read_text(encoding="utf8").splitlines()) if store.FAILED.is_file() else 0,
    }
