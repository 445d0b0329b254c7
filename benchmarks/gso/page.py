"""Writes docs/results/gso.md, all tables of what GSO shows, from the runs of benchmarks/gso.py.

    python benchmarks/gso.py page          # also writes benchmarks/results/gso/proof.json, the cells behind the tables

The method is the optimizer that ships, `gradsplit.GSO`, with nothing chosen. Every other method runs at the best of
its cells on seed 0, or on more seeds below 10 where all of its cells ran on them; which cell that is, is computed here.
The sentences around the tables are those of benchmarks/gso/words.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gso.beside import DECAYS, ENOUGH, FRESH, RESULTS, SHARE, Runs, beside, rates, setting, table
from benchmarks.gso.words import HEAD, IN_SHORT, KINDS, NAMES, NOTES, SHORT
from benchmarks.tables import with_range as shown

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "gso.md"


def note(name: str, **values: object) -> str:
    """The sentences below a table, with the numbers that the runs give."""
    return NOTES.get(name, "").format(**values)


def listed(words: Sequence[str]) -> str:
    """The words with commas, and the last one after "and"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


class Page:
    """The text, and the bars as they are met."""

    def __init__(self, dates: str) -> None:
        self.dates = dates
        self.parts: list[str] = []
        self.bars: list[list[str]] = []
        self.words: dict[str, str] = {}
        """What the sentences below the bars take from the sections."""

    def section(self, title: str, *parts: str) -> None:
        """Add a section."""
        where = f"AMD EPYC, 2 cores, no GPU, one thread per run, {self.dates}. Seeds and runs: see the table."
        self.parts.append(f"## {title}\n\n{where}\n\n" + "".join(part.rstrip() + "\n\n" for part in parts if part))

    def bar(self, task: str, asked: str, found: str, met: bool | None, *scores: list[float]) -> None:
        """Add a line of the first table; `scores` are those of GSO's seeds, and of those of the one beside it."""
        known = met is not None and "nan" not in found and found != "not run"
        seeds = " and ".join(str(len(some)) for some in scores)
        self.bars.append(
            [task, asked, *([found, "met" if met else "**not met**"] if known else ["", "not run"]), seeds]
        )


def middle(scores: list[float]) -> float:
    """The median, nan where nothing has been run."""
    return statistics.median(scores) if scores else math.nan


def below(ours: list[float], theirs: list[float]) -> float:
    """By which part the median of ours is lower."""
    return 1 - middle(ours) / middle(theirs)


TEXTS = ["gso", "muon", "soap", "adamw", "schedulefree", "lamb", "prodigy"]


def texts(runs: Runs, page: Page) -> None:
    """GPT, second text, LSTM."""
    made, found = beside(runs, "validation loss", "gpt", 1000, TEXTS)
    ours, keep = found["gso"], runs.keep
    page.section("GPT on the language reference, 1,000 steps", made, rates(runs, "gpt", 1000, TEXTS[1:]), note("gpt"))
    page.bar("GPT, 1,000 steps", f"at most {keep('bar GPT', 1.20):.2f}", shown(ours), middle(ours) <= 1.20, ours)
    for method, bar in (("adamw", 0.15), ("muon", 0.03)):
        gain = keep(f"GPT below {method}", below(ours, found[method]))
        asked, name = f"{100 * bar:.0f} % below {NAMES[method].split(' +')[0]}'s best", "GPT, 1,000 steps"
        page.bar(name, asked, f"{100 * gain:.1f} % below", gain >= bar, ours, found[method])
    second = {"options": {"text": "second"}}
    made, found = beside(runs, "validation loss of the second text", "gpt", 1000, TEXTS, **second)
    page.section(
        "GPT on a second text, 1,000 steps",
        note("second"),
        made,
        rates(runs, "gpt", 1000, TEXTS[1:], **second),
    )
    for method, bar in (("adamw", 0.12), ("muon", 0.02)):
        gain = keep(f"second text below {method}", below(found["gso"], found.get(method, [])))
        asked = f"{100 * bar:.0f} % below {NAMES[method].split(' +')[0]}'s best"
        both = (found["gso"], found.get(method, []))
        page.bar("second text", asked, f"{100 * gain:.1f} % below", gain >= bar, *both)
    made, found = beside(runs, "validation loss of the LSTM", "lstm", 500, TEXTS)
    page.section("LSTM, 500 steps", made, rates(runs, "lstm", 500, TEXTS[1:]), note("lstm"))
    ours = found["gso"]
    page.bar("LSTM, 500 steps", f"at most {keep('bar LSTM', 1.26):.2f}", shown(ours), middle(ours) <= 1.26, ours)


def detectors(runs: Runs, page: Page) -> None:
    """The exploding and the healthy detector."""
    parts = []
    for title, options, bar in (("exploding", {}, 0.48), ("healthy", {"healthy": True}, 0.45)):
        made, found = beside(runs, f"score, {title}", "detection", 500, TEXTS, more=True, options=options)
        parts += [made, rates(runs, "detection", 500, TEXTS[1:], options=options)]
        ours = found["gso"]
        asked = f"at least {runs.keep(f'bar {title}', bar):.2f}"
        page.bar(f"{title} detector", asked, shown(ours), middle(ours) >= bar, ours)
    page.section("Detectors, 500 steps", *parts, note("detectors"))


def usual(options: dict[str, Any]) -> bool:
    """Whether a cell has the decay that all methods have unless another was chosen."""
    return "decay" not in options


def chosen(options: dict[str, Any]) -> bool:
    """Whether a cell has another decay."""
    return not usual(options)


def decay_of(options: dict[str, Any]) -> float:
    """The decay of a cell."""
    return options.get("decay", options.get("weight_decay", DECAYS[0]))


def best_of(found: dict[str, list[float]], method: str) -> list[float]:
    """The scores of a method's best cell on fresh seeds, be it the chosen one or not."""
    cells = [scores for name, scores in found.items() if name.split(",")[0] == method]
    return max(cells, key=middle)


def photographs(runs: Runs, page: Page) -> None:
    """Trees on aerial photographs: all methods at the usual decay, then each with one that its own cells chose."""
    place, others = ("aerial", 500), ["gso", "adamw", "soap", "muon"]
    methods, mine = [*others, "sgdm", "split"], {"weight_decay": 1.0}
    made, found = beside(runs, "mAP at an overlap of .5", *place, methods, more=True, kind=usual)
    title = "mAP with a larger decay"
    larger, decayed = beside(runs, title, *place, others, more=True, mine=mine, kind=chosen)
    rows = []
    for method in others:
        cells = [tried[0] for tried in runs.tried(*place, method)]
        for row in sorted(cells, key=lambda row: decay_of(row["method_options"])):
            cell = {name: row[name] for name in ("lr", "method_options")}
            held = [run for run in runs.find(*place, method, **cell) if run["seed"] in FRESH]
            if len(held) >= ENOUGH:
                ends, sites = [run["losses"][-1] for run in held], [run["metrics"]["test_map50"] for run in held]
                runs.cells[f"photographs, {row['key']} and on"] = {"losses at the end": ends, "other site": sites}
                rows.append([SHORT[method], setting(method, cell), shown(ends, 1), shown(sites), str(len(held))])
    sites = table(["method", "setting", "training loss at the end", "mAP on another site", "fresh seeds"], rows)
    usuals, decays = ({m: best_of(scores, m) for m in others} for scores in (found, decayed))
    gains = {m: runs.keep(f"decay: {m}", middle(decays[m]) / middle(usuals[m]) - 1) for m in others}
    words = note("aerial", gains=listed([f"{SHORT[method]} {100 * gain:+.0f} %" for method, gain in gains.items()]))
    page.section("Aerial photographs, 500 steps", made, larger, sites, rates(runs, *place, methods[1:]), words)
    ours = found["gso"]
    best = max([*(usuals[m] for m in others[1:]), *(decays[m] for m in others[1:])], key=middle)
    ahead = [f"{SHORT[m]} ({middle(usuals[m]):.3f})" for m in others[1:] if middle(usuals[m]) > middle(ours)]
    are = "are" if len(ahead) > 1 else "is"
    page.words["photographs"] = f"{listed(ahead)} {are} ahead of GSO ({middle(ours):.3f})"
    page.words["decayed"] = listed([f"{SHORT[m]} {middle(decays[m]):.3f}" for m in others])
    text = f"{middle(ours):.3f}; best other {middle(best):.3f}"
    page.bar("aerial photographs", "above every baseline's best", text, middle(ours) > middle(best), ours, best)


def decay(runs: Runs, page: Page) -> None:
    """What a stronger decay of the weights does."""
    decays, rows, fresh_rows = DECAYS, [], []
    for title, task, steps, options in (
        ("aerial photographs ↑", "aerial", 500, {}),
        ("healthy detector ↑", "detection", 500, {"healthy": True}),
        ("exploding detector ↑", "detection", 500, {}),
        ("plain stack of 12 layers ↑", "plain-stack", 350, {}),
        ("hot residual stack ↑", "residual-stack", 900, {}),
        ("mixer ↑", "mixer", 600, {}),
        ("LSTM ↓", "lstm", 500, {}),
        ("GPT ↓", "gpt", 500, {}),
    ):
        row, fresh_row, count = [], [], ""
        for value in decays:
            extra = {} if value == 0.01 else {"weight_decay": runs.keep(f"decay {value}", value)}
            found = runs.find(task, steps, "gso", lr=SHARE, options=options, method_options=extra)
            some = [r["score"] for r in found if r["seed"] in (0, 1)]
            runs.cells.setdefault(f"{task} {steps} {options} decay {value}", {})["seeds 0, 1"] = some
            row.append(", ".join(f"{score:.3f}" for score in some))
            fresh = runs.scores("fresh", task, steps, "gso", lr=SHARE, options=options, method_options=extra)
            fresh_row.append(shown(fresh) if fresh else "")
            count = str(len(fresh)) if value != 0.01 and fresh else count
        rows.append([title, f"{steps}", *row])
        if any(fresh_row[1:]):
            fresh_rows.append([title, *fresh_row, count])
    runs.keep("decay 0.01", 0.01)
    heads = [f"decay {value:g}" for value in decays]
    page.section(
        "Weight decay",
        table(["GSO, share 0.03", "steps", *(f"{head}, seeds 0, 1" for head in heads)], rows),
        table(["GSO, share 0.03", *heads, "fresh seeds of the larger decay"], fresh_rows),
        note("decay"),
    )


CHANCE = 0.15
"""What an accuracy of ten classes must exceed to count as learned; chance is 0.1."""


def stacks(runs: Runs, page: Page) -> None:
    """Convolutions without normalisation."""
    keep = runs.keep
    methods = ["gso", "adamw", "soap", "muon", "sgdm"]
    parts, by_gain = [], {}
    for gain in (3.0, 2.0, 1.0, 0.5):
        options = {} if gain == 3.0 else {"gain": gain}
        title = f"accuracy at gain {keep(f'gain {gain}', gain):g}"
        made, by_gain[gain] = beside(runs, title, "residual-stack", 900, methods, more=True, options=options)
        if len(by_gain[gain]) > 1:
            parts += [made, rates(runs, "residual-stack", 900, methods[1:], options=options)]
    rows = []
    for gain in sorted(by_gain):
        options = {} if gain == 3.0 else {"gain": gain}
        scores = runs.scores("fresh", "residual-stack", 900, "gso", lr=SHARE, options=options)
        rows.append([f"{gain:g}", shown(scores), str(len(scores))])
    gains = table(["gain of the blocks", "accuracy of GSO", "fresh seeds"], rows)
    found, cools = by_gain[3.0], by_gain[0.5]
    page.section("Residual stack of 48 convolutions, 900 steps", gains, *parts, note("hot"))
    worst = min(found["gso"], default=math.nan)
    asked = f"every seed at least {keep('bar hot', 0.90):.2f}"
    page.bar("hot residual stack", asked, f"lowest {worst:.3f}", worst >= 0.90, found["gso"])
    ours = cools["gso"]
    asked = f"at least {keep('bar cool', 0.93):.2f}"
    page.bar("cool residual stack", asked, shown(ours), middle(ours) >= 0.93, ours)
    parts, by_depth = [], {}
    for title, task, steps, options in (
        ("12 layers", "plain-stack", 350, {}),
        ("36 layers", "plain-stack", 350, {"depth": 36}),
        ("146 layers", "deep-stack", 300, {}),
    ):
        made, found = beside(runs, f"accuracy, {title}", task, steps, methods, more=True, options=options)
        parts += [made, rates(runs, task, steps, methods[1:], options=options)]
        by_depth[title] = dict(found)
        ours = found.pop("gso")
        if not ours:
            page.bar(f"plain stack of {title}", "", "", None)
        elif title == "12 layers":
            asked = f"at least {keep('bar 12 layers', 0.94):.2f}"
            page.bar("plain stack of 12 layers", asked, shown(ours), middle(ours) >= 0.94, ours)
        else:
            best = max(found.values(), key=middle)
            text, met = f"{middle(ours):.3f}; best other {middle(best):.3f}", middle(ours) >= 0.98 * middle(best)
            page.bar(f"plain stack of {title}", "the best baseline within 2 %", text, met, ours, best)
    deepest = {m: best_of(by_depth["146 layers"], m) for m in methods if m != "sgdm"}
    left = {m: sum(score > CHANCE for score in scores) for m, scores in deepest.items()}
    counts = [f"{SHORT[m]} on {left[m]} of {len(scores)}" for m, scores in deepest.items()]
    page.words["counts"] = listed(counts)
    words = note("stacks", counts=listed(counts), chance=CHANCE)
    page.section("Plain stacks of 12, 36 and 146 convolutions", *parts, words, *why(runs), note("why"))


def why(runs: Runs) -> list[str]:
    """What makes the default fail on the deep plain stacks: the share, and not the limit on growth."""
    tables = []
    deep = {"options": {"depth": 36}}
    for head, method, cells in (
        ("share of GSO", "gso", [(share, {}) for share in (0.03, 0.015, 0.0075, 0.004, 0.002)]),
        ("limit on growth, share 0.03", "reference", [(SHARE, {"limit": limit}) for limit in (1.0, 1.5, 2.0)]),
    ):
        rows = []
        for lr, options in cells:
            value = runs.keep(f"{head} {lr} {options}", options.get("limit", lr))
            line = [f"{value:g}"]
            for task, steps, wanted in (("plain-stack", 350, deep), ("deep-stack", 300, {})):
                found = runs.find(task, steps, method, lr=lr, method_options=options, **wanted)
                before = [row for row in found if row.get("series") is None]
                some = [row["score"] for row in before if row["seed"] in (0, 1)]
                fresh = [row["score"] for row in before if row["seed"] in FRESH]
                if found:
                    runs.cells[f"{found[0]['key']} and on"] = {"choosing": some, "fresh": fresh}
                text = ", ".join(f"{score:.3f}" for score in some) or "not run"
                line += [text, shown(fresh) if fresh else ""] if wanted else [text]
            rows.append(line)
        heads = [head, "accuracy of 36 layers, seeds 0, 1", "36 layers, fresh", "146 layers, seeds 0, 1"]
        tables.append(table(heads, rows))
    return tables


def small(runs: Runs, page: Page) -> None:
    """Small data, adapters, zero-initialised matrices."""
    methods = ["gso", "adamw", "muon", "soap"]
    made, found = beside(runs, "accuracy", "mixer", 600, methods, more=True)
    rows = []
    for share in (0.03, 0.01):
        scores = runs.scores("fresh", "mixer", 600, "gso", lr=share)
        rows.append([f"{share:g}", shown(scores), str(len(scores))])
        runs.keep(f"share {share}", share)
    shares = table(["share of GSO", "accuracy", "fresh seeds"], rows)
    cells = rates(runs, "mixer", 600, methods[1:])
    counts = [f"{SHORT[m]} {100 * (middle(found[m]) - middle(found['gso'])):+.2f} points" for m in methods[1:]]
    against = f"Against GSO's median stand {listed(counts)}"
    page.section("Small data: a mixer on 1,437 digits, 600 steps", made, cells, shares, note("mixer", ahead=against))
    points = runs.keep("mixer: AdamW over GSO", middle(found["adamw"]) - middle(found["gso"]))
    asked, text = "within .5 points of AdamW", f"{100 * points:.2f} points below"
    missed = f"- **Digits mixer.** AdamW is ahead by {100 * points:.2f} points; one of the 360 test digits is 0.28.\n"
    page.words["digits"] = "" if points <= 0.005 else missed
    page.bar("digits mixer", asked, text, points <= 0.005, found["gso"], found["adamw"])
    runs.keep("bar mixer", 0.005)
    made, found = beside(runs, "validation loss, LoRA", "lora", 400, methods)
    over = runs.keep("LoRA: GSO over AdamW", middle(found["gso"]) / middle(found["adamw"]) - 1)
    zero = {"options": {"zero": True}}
    more, others = beside(runs, "validation loss, zero-initialised", "gpt", 500, methods, **zero)
    tried = [rates(runs, "lora", 400, methods[1:]), rates(runs, "gpt", 500, methods[1:], **zero)]
    page.section("Matrices that start at zero", made, tried[0], more, tried[1], note("zero"))
    lora, both = f"{100 * over:.2f} % higher", (found["gso"], found["adamw"])
    page.bar("LoRA on a trained GPT", "AdamW's best within 1 %", lora, over <= 0.01, *both)
    less = runs.keep("zero: GSO below AdamW", below(others["gso"], others["adamw"]))
    zeros, both = f"{100 * less:.1f} % below", (others["gso"], others["adamw"])
    page.bar("zero-initialised GPT", "AdamW's best within 1 %", zeros, less >= -0.01, *both)


def depth(runs: Runs, page: Page) -> None:
    """Transformers of 6, 12 and 24 layers."""
    shares, adam = (0.015, 0.02, 0.03, 0.045, 0.06), (1e-3, 3e-3, 1e-2, 3e-2)
    ours_rows, their_rows, fresh_rows, others = [], [], [], []
    for value in (*shares, *adam):
        runs.keep(f"rate {value}", value)
    for layers in (6, 12, 24):
        options = {"layers": layers, "width": 48}
        for steps in (300, 400, 1000):
            ours = {s: runs.scores("choosing", "gpt", steps, "gso", lr=s, options=options) for s in shares}
            theirs = {r: runs.scores("choosing", "gpt", steps, "adamw", lr=r, options=options) for r in adam}
            if any(ours.values()):
                ours_rows.append([str(layers), f"{steps:,}", *(shown(ours[s]) for s in shares)])
            if any(theirs.values()):
                their_rows.append([str(layers), f"{steps:,}", *(shown(theirs[r]) for r in adam)])
        share = min(shares, key=lambda s: middle(runs.scores("choosing", "gpt", 300, "gso", lr=s, options=options)))
        rate = min(adam, key=lambda r: middle(runs.scores("choosing", "gpt", 300, "adamw", lr=r, options=options)))
        seeds = "fresh" if runs.scores("fresh", "gpt", 300, "adamw", lr=rate, options=options) else "choosing"
        fresh = {lr: runs.scores(seeds, "gpt", 300, "gso", lr=lr, options=options) for lr in (SHARE, share)}
        rival = runs.scores(seeds, "gpt", 300, "adamw", lr=rate, options=options)
        texts = [shown(fresh[SHARE]), f"{shown(fresh[share])}, share {share:g}", f"{shown(rival)}, rate {rate:g}"]
        gain = runs.keep(f"{layers} layers: below AdamW", below(fresh[SHARE], rival))
        over = runs.keep(f"{layers} layers: default over the best share", -below(fresh[SHARE], fresh[share]))
        count = str(len(rival)) if seeds == "fresh" else "seed 0"
        fresh_rows.append([str(layers), *texts, count, f"{100 * gain:.1f} %", f"{100 * over:.1f} %"])
        title = f"GPT of {layers} layers"
        made, found = beside(runs, f"validation loss, {layers} layers", "gpt", 300, TEXTS, options=options)
        if len(found) > 2:
            others += [made, rates(runs, "gpt", 300, ["muon", "soap"], options=options)]
        page.bar(title, "15 % below AdamW's best", f"{100 * gain:.1f} % below", gain >= 0.15, fresh[SHARE], rival)
        asked = "the default share within 3 % of the best of five"
        page.bar(title, asked, f"{100 * over:.1f} % over", over <= 0.03, fresh[SHARE])
    heads = ["layers", "default", "best share of seed 0", "AdamW's best of seed 0", "fresh seeds"]
    page.section(
        "Depth: GPTs of 6, 12 and 24 layers",
        note("depth"),
        table([*heads, "default below AdamW", "default over the best share"], fresh_rows),
        table(["layers", "steps, seed 0", *(f"share {s:g}" for s in shares)], ours_rows),
        table(["layers", "steps, seed 0", *(f"AdamW {r:g}" for r in adam)], their_rows),
        *others,
        note("length"),
    )


def faults(runs: Runs, page: Page) -> None:
    """Faults in a twentieth of the steps."""
    clean = {r["seed"]: r["score"] for r in runs.find("gpt", 500, "gso", lr=SHARE) if r["seed"] in (0, 1, 2)}
    runs.cells["clean, 500 steps"] = {"scores": list(clean.values())}
    runs.keep("clean", middle(list(clean.values())))
    rows = [["none", ", ".join(f"{score:.3f}" for score in clean.values()), "", ""]]
    for kind, words in KINDS.items():
        found = runs.find("gpt", 500, "gso", lr=SHARE, fault={"kind": kind, "rate": 0.05})
        found = [r for r in found if r["seed"] in clean]
        if not found:
            page.bar(f"faults: {words}", "within 2 % of clean", "", None)
            continue
        runs.cells[found[0]["key"]] = {"scores": [r["score"] for r in found]}
        over = [r["score"] / clean[r["seed"]] - 1 for r in found]
        for row, value in zip(found, over, strict=True):
            runs.keep(f"{kind}, seed {row['seed']}: over clean", value)
        typical = runs.keep(f"{kind}: over clean, median", statistics.median(over))
        scores, changes = ", ".join(f"{r['score']:.3f}" for r in found), ", ".join(f"{100 * x:+.1f} %" for x in over)
        counts = ", ".join(str(r["spoiled"]) for r in found)
        rows.append([words, scores, changes, counts])
        page.bar(f"faults: {words}", "within 2 % of clean", f"{100 * typical:+.1f} %", typical <= 0.02, over)
    head = ["in 5 % of the steps", "validation loss, seeds 0, 1, 2", "over the clean run of the seed", "spoiled steps"]
    page.section("Faults, GPT of 500 steps", table(head, rows), note("faults"))


CENTRES = {"gso": 0.03, "soap": 0.03, "muon": 0.03, "schedulefree": 0.003, "adamw": 0.01}
"""The middle of the five rates: GSO's default, and the best of each other method's five."""


def curves(runs: Runs, page: Page) -> None:
    """A factor of 100 in the rate."""
    rows = []
    for method, best in CENTRES.items():
        extra = {"method_options": {"adam": 0.01}} if method == "muon" else {}
        row, scores = [], []
        for factor in (0.1, 1 / 3, 1.0, 10 / 3, 10.0):
            lr = float(f"{best * factor:.1g}")
            found = runs.scores("choosing", "gpt", 500, method, lr=lr, **extra)
            scores += found
            row.append(f"{found[0]:.3f} (`{lr:g}`)" if found else "not run")
        span = f"{runs.keep(f'{method}: worst over best', max(scores) / min(scores)):.2f}" if scores else ""
        rows.append([NAMES[method], *row, span])
    head = ["validation loss, seed 0", "÷ 10", "÷ 3", "middle", "× 3", "× 10", "worst / best"]
    page.section("A factor of 100 in the rate, GPT of 500 steps", table(head, rows), note("curves"))


def seconds(runs: Runs, page: Page) -> None:
    """Time per step, and equal seconds."""
    kept = json.loads((RESULTS / "seconds.json").read_text(encoding="utf8"))
    rows = []
    for row in kept["rows"]:
        names, low_high = row["median_ms"], row["ratio_range"]
        cells = [f"{names[n]['whole']:.1f} ({names[n]['step']:.1f})" for n in ("adamw", "gso")]
        for name in names:
            for part in ("whole", "step"):
                runs.keep(f"batch {row['batch']} {name} {part} ms", names[name][part])
        for name, value in (("ratio", row["ratio"]), ("low", low_high[0]), ("high", low_high[1])):
            runs.keep(f"batch {row['batch']} {name}", value)
        rows.append([str(row["batch"]), *cells, f"{row['ratio']:.2f} ({low_high[0]:.2f} to {low_high[1]:.2f})"])
        if row["batch"] == 16:
            text = f"{row['ratio']:.2f}, falling to {kept['rows'][-1]['ratio']:.2f} at batch 64"
            asked = f"at most {runs.keep('bar seconds', 1.25):.2f} of AdamW's"
            page.bar("GPT, time per step at its batch of 16", asked, text, row["ratio"] <= 1.25)
    head = ["batch", "fused AdamW + clip, ms per step (optimizer)", "GSO, ms per step (optimizer)", "ratio"]
    walls = table(head, rows)
    equal = json.loads((RESULTS / "equal.json").read_text(encoding="utf8"))
    rows = []
    for row in equal["rows"]:
        low, high = row["ratio_range"]
        prefix = f"{row['task']} {row['method']}"
        for name, value in (("ms", row["ms"]), ("ratio", row["ratio"]), ("low", low), ("high", high)):
            runs.keep(f"{prefix} {name}", value)
        ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})" if row["method"] != "adamw" else "1"
        rows.append([row["task"], NAMES[row["method"]], f"{row['ms']:.1f}", ratio, str(row["steps"])])
    paces = table(["task", "method", "CPU ms per step", "over AdamW", "steps in AdamW's time"], rows)
    per_step = {(row["task"], row["method"]): row for row in equal["rows"]}
    rows = []
    for title, task, full, wanted in (
        ("GPT", "gpt", 1000, {}),
        ("second text", "gpt", 1000, {"options": {"text": "second"}}),
        ("LSTM", "lstm", 500, {}),
    ):
        cell, _ = runs.cell_of(task, full, "adamw", more=False, **wanted)
        rival = runs.scores("fresh", task, full, "adamw", **cell, **wanted)
        rows.append([title, NAMES["adamw"], str(full), shown(rival), str(len(rival)), ""])
        for method in ("gso", "muon", "soap"):
            for steps in sorted({r["steps"] for r in runs.rows if r["task"] == task}):
                planned = per_step[title, method]["steps"]
                if steps == full or abs(steps - planned) > 0.03 * planned:
                    continue
                extra = {"lr": SHARE} if method == "gso" else {}
                scores = runs.scores("fresh", task, steps, method, **extra, **wanted)
                if not scores:
                    continue
                gain = below(scores, rival)
                size = runs.keep(f"{title}: {method} beside AdamW at equal seconds", abs(gain))
                text = f"{100 * size:.1f} % {'lower' if gain > 0 else 'higher'}"
                rows.append([title, NAMES[method], str(steps), shown(scores), str(len(scores)), text])
                if method == "gso":
                    name, text = f"{title}, at equal CPU seconds", f"{100 * gain:.1f} % below"
                    page.bar(name, "ahead of AdamW", text, gain > 0, scores, rival)
    equals = table(["task", "method", "steps", "validation loss", "fresh seeds", "than AdamW"], rows)
    page.section(
        "Time per step, and equal seconds",
        walls,
        note("walls"),
        paces,
        note("paces"),
        equals,
        note("equal"),
    )


def in_short(page: Page) -> str:
    """The first paragraph, from the bars."""
    found = {(task, asked): text for task, asked, text, *_ in page.bars}
    missed: dict[str, list[str]] = {}
    for task, asked, _, said, _ in page.bars:
        if "not" in said:
            missed.setdefault(asked, []).append(task)
    return IN_SHORT.format(
        met=sum(row[3] == "met" for row in page.bars),
        all=len(page.bars),
        adamw=found["GPT, 1,000 steps", "15 % below AdamW's best"],
        muon=found["GPT, 1,000 steps", "3 % below Muon's best"],
        detector=found["exploding detector", "at least 0.48"].split(" (")[0],
        missed="; ".join(f'"{asked}" ({listed(tasks)})' for asked, tasks in missed.items()),
    )


def made(path: Path = RESULTS / "runs.jsonl") -> tuple[str, str]:
    """The page and the cells behind it."""
    runs = Runs(path)
    days = sorted({row["date"].split()[0] for row in runs.rows})
    page = Page(" to ".join(dict.fromkeys((days[0], days[-1]))))
    for make in (texts, detectors, photographs, decay, stacks, small, depth, faults, curves, seconds):
        make(runs, page)
    where = f"AMD EPYC, 2 cores, {page.dates}. Seeds and runs stand in the sections below.\n\n"
    bars = (
        "## The bars\n\n"
        + where
        + table(["task", "bar", "measured", "", "seeds of GSO and the other"], page.bars)
        + note("bars", **page.words)
    )
    data = {"source": "benchmarks/results/gso/runs.jsonl", "cells": runs.cells, "derived": runs.derived}
    below = bars.rstrip() + "\n\n" + "".join(page.parts).rstrip() + "\n"
    titles = ["How to read the tables", *re.findall(r"^## (.+)$", below, re.MULTILINE)]
    places = [f"- [{title}](#{re.sub('[^a-z0-9 _-]', '', title.lower()).replace(' ', '-')})" for title in titles]
    head = HEAD.replace("DATES", page.dates).replace("SHORT", in_short(page)).replace("PLACES", "\n".join(places))
    text = head + below
    return text, json.dumps(data, indent=1) + "\n"


def main(asked: Sequence[str]) -> None:
    """Write both."""
    argparse.ArgumentParser(prog="gso.py page", description=__doc__.splitlines()[0]).parse_args(asked)
    text, data = made()
    PAGE.write_text(text, encoding="utf8")
    (RESULTS / "proof.json").write_text(data, encoding="utf8")
