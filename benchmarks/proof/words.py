"""The sentences of docs/results/README.md that state a result, made from the numbers of its tables.

A sentence that a person wrote cannot follow when a run is added; these do. What no number decides (why a method is
behind) stands in the page itself, or in `REASONS` for a row that may leave the list.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.proof import plan
from benchmarks.proof.numbers import COLUMNS, NEAR, Row

__all__ = [
    "attention_words",
    "behind_words",
    "cosine_words",
    "count_words",
    "opening_words",
    "outputs_words",
    "partition_words",
    "photographs_words",
    "sensitivity_words",
    "short_words",
    "sizes_words",
    "strategies_words",
    "time_words",
]

REASONS = {
    "photographs": "GSO overfits the one photograph that it learns from ([losses](#photographs)).",
    "plain stack, 36 layers": "The seeds of all methods differ much there.",
    "plain stack, 146 layers": "GSO shortens its share very much where so many layers stand in series. Longer shares "
    "did not leave chance either.",
}
UNKNOWN = "We do not know why."


def _listed(words: Iterable[str]) -> str:
    """The words with commas, and the last one after "and".

    >>> _listed(["a"]), _listed(["a", "b"]), _listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    held = list(words)
    return held[0] if len(held) == 1 else f"{', '.join(held[:-1])} and {held[-1]}"


def _number(count: int, what: str) -> str:
    """A number with its noun.

    >>> _number(1, "row"), _number(3, "row")
    ('1 row', '3 rows')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def _share(value: float) -> str:
    return f"{100 * abs(value):.1f} %"


def _score(entry: Row) -> float | None:
    score: float | None = entry["fresh"]["median"] if entry["fresh"] else entry["choosing"]
    return score


# ---- the one table


def opening_words(made: Row) -> str:
    """The three sentences with which the page begins."""
    count, costs = made["count"], made["costs"]
    over = [found["gso"]["over_adamw"] for found in costs.values()]
    time = (
        f"A step takes it {statistics.median(over):.2f} times as long as AdamW's (median of {len(over)} tasks; at most "
    )
    time = f"{time}{max(over):.2f} times)." if over else ""
    titles = [f'"{title}"' for title in count["not_near"]]
    behind = f"It is further behind in {_listed(titles)}. " if titles else ""
    return (
        f"`gs.GSO`, with nothing chosen, ran beside up to {len(COLUMNS) - 1} other optimizers on {count['rows']} small "
        "tasks. Each of the others had the best of several learning rates. "
        f"GSO is the best in {count['first']} tasks, and the best or within {100 * NEAR:.0f} % of it in "
        f"{count['first_or_near']} ({100 * count['share']:.0f} %). {behind}{time}\n"
    )


def count_words(count: Row) -> str:
    """What the table says about the aim."""
    behind = f" Further behind: {'; '.join(count['not_near'])}." if count["not_near"] else ""
    many = "one row" if count["one_seed"] == 1 else f"{count['one_seed']} rows"
    single = f"\nIn {many} GSO has one seed, the one that chose. A difference of a few per cent may turn there.\n"
    return (
        f"GSO is first in {count['first']} of {count['rows']} rows, and first or within 2 % of the first in "
        f"{count['first_or_near']} of them ({100 * count['share']:.0f} %; the aim was 80 %).{behind}\n\n"
        f"On every shared seed GSO is ahead of the best other method in {count['ahead_on_all']} rows, and behind it in "
        f"{count['behind_on_all']}. In {count['unclear']} rows the seeds do not agree.\n\n"
        f"Where few others have run, it is easy to be first. In the {count['wide']} rows with at least three others "
        f"GSO is first in {count['wide_first']}, and first or within 2 % in {count['wide_near']}. In the "
        f"{_number(count['full'], 'row')} in which all {len(COLUMNS)} have run it is first in {count['full_first']}, "
        f"and first or within 2 % in {count['full_near']}.\n\n"
        "GSO's default was chosen on text, recurrent nets, detectors and stacks, with a look at Fashion-MNIST and "
        f"adapters. The {count['unseen']} tasks that had no part in that are spoken digits, sentences, diffusion, "
        f"control and experts. There GSO is first in {count['unseen_first']}, and first or within 2 % in "
        f"{count['unseen_near']}.\n" + (single if count["one_seed"] else "")
    )


def behind_words(rows: Sequence[Row]) -> str:
    """One item per row in which GSO is further behind than 2 %: by how much, on which seeds, and why."""
    items = []
    for row in rows:
        if row["rank"] is None or row["margin"] >= -NEAR:
            continue
        others = [method for method in row["methods"] if method != "gso"]
        place = "last" if row["rank"] == row["of"] else f"{row['rank']} of {row['of']}"
        best = COLUMNS[row["best_other"]] if row["best_other"] else _listed(COLUMNS[method] for method in others)
        seeds = f", on {row['shared'] - row['ahead_on']} of {_number(row['shared'], 'seed')}" if row["shared"] else ""
        title = row["workload"][0].upper() + row["workload"][1:]
        items.append(
            f"- {title}: GSO ranks {place}. {best} is ahead by {_share(row['margin'])}{seeds}. "
            f"{REASONS.get(row['workload'], UNKNOWN)}\n"
        )
    return "".join(items) or "In no row.\n"


def photographs_words(found: Row) -> str:
    """Who is ahead on the same site and on the other one."""
    here, there = ({m: found[m][name]["median"] for m in found} for name in ("map50", "test_map50"))
    spans = [found[m][name] for m in found for name in ("map50", "test_map50")]
    wide = statistics.median(span["max"] - span["min"] for span in spans)
    return (
        f"At an overlap of 0.5 {_order(here)} is the order on the same site, {_order(there)} on the other one. The "
        f"seeds of one method lie {wide:.2f} apart (median), so most of these differences can be chance.\n\n"
        f"Over the last steps the training loss is {_losses(found)} (medians). A lower one does not give a better "
        "detector here.\n"
    )


def _losses(found: Row) -> str:
    losses = {method: statistics.median(held["last_losses"]) for method, held in found.items()}
    order = sorted(losses, key=lambda method: losses[method])
    return _listed(f"{losses[method]:.1f} with {COLUMNS[method]}" for method in order)


def _order(scores: dict[str, float], *, higher: bool = True) -> str:
    return ", ".join(COLUMNS[method] for method in sorted(scores, key=lambda m: scores[m], reverse=higher))


# ---- the schedule, time


def cosine_words(cosine: Sequence[Row], rows: Sequence[Row]) -> str:
    """What the cosine does to each method, beside the line to zero."""
    linear = {row["workload"]: row for row in rows}
    said = []
    for row in cosine:
        before, change = linear[row["workload"]]["methods"], {}
        for method, entry in row["methods"].items():
            pair = (_score(entry), _score(before[method])) if method in before else (None, None)
            if pair[0] is not None and pair[1]:
                sign = 1 if row["higher_is_better"] else -1
                change[method] = sign * (pair[0] - pair[1]) / pair[1]
        shown = _listed(f"{COLUMNS[method]} by {100 * value:+.1f} %" for method, value in change.items())
        worst = min(change, key=lambda m: change[m])
        first = COLUMNS[row["first"]]
        stays = "stays" if row["first"] == linear[row["workload"]]["first"] else "is"
        said.append(
            f"Beside a line to zero the score changes for {shown}. {COLUMNS[worst]} loses most, and {first} {stays} "
            "first.\n"
        )
    return "\n".join(said)


def time_words(costs: Row) -> str:
    """What GSO's step costs beside those of the others."""
    over = {name: {m: found[m]["over_adamw"] for m in COLUMNS} for name, found in costs.items()}
    ratios = [found["gso"] for found in over.values()]
    cheaper = {m: sum(found["gso"] < found[m] for found in over.values()) for m in ("muon", "soap")}
    return (
        f"A step with GSO takes {min(ratios):.2f} to {max(ratios):.2f} times as long as one with AdamW and its clip. "
        f"It takes less than one with Muon in {cheaper['muon']} of {len(over)} rows, and less than one with SOAP in "
        f"{cheaper['soap']}.\n"
    )


# ---- sensitivity and the two instabilities


def sensitivity_words(rows: Sequence[Row]) -> str:
    """For each size, whom a rate matters to most and least; the best losses; what was lost."""
    said = []
    for size in dict.fromkeys(row["size"] for row in rows):
        here = sorted((row for row in rows if row["size"] == size), key=lambda row: row["sensitivity"])
        names = [f"{COLUMNS[row['method']]} ({row['sensitivity']:.2f})" for row in here]
        best = min(here, key=lambda row: row["best"])
        others = _listed(f"{COLUMNS[row['method']]}'s {row['best']:.2f}" for row in here if row is not best)
        said.append(
            f"- {size} parameters, {here[0]['steps']} steps: a rate matters least to {names[0]} and most to {names[-1]}"
            f". The lowest loss of all is {COLUMNS[best['method']]}'s {best['best']:.2f}, beside {others}.\n"
        )
    lost = sum(value is None for row in rows for value in row["attention"])
    runs = sum(len(row["losses"]) for row in rows)
    end = "No run was lost." if not lost else f"{lost} of {runs} runs were lost."
    return "".join(said) + f"\n{end}\n"


def attention_words(rows: Sequence[Row]) -> str:
    """The largest attention logits around the usual rate and at the largest one."""

    def span(row: Row, at: slice) -> list[float]:
        return [value for value in row["attention"][at] if value is not None]

    middle = slice(len(plan.AROUND) // 2 - 1, len(plan.AROUND) // 2 + 1)  # the two rates around the usual one
    around = [value for row in rows for value in span(row, middle)]
    tops = []
    for method in dict.fromkeys(row["method"] for row in rows):
        values = [value for row in rows if row["method"] == method for value in span(row, slice(-1, None))]
        tops.append(f"{min(values):,.0f} to {max(values):,.0f} with {COLUMNS[method]}" if values else "")
    return (
        f"At the largest rate the logits reach {_listed(top for top in tops if top)}. GSO has nothing against their "
        f"growth. At the two rates around the usual one they stay below {max(around):.0f} for all.\n"
    )


def partition_words(rows: Sequence[Row]) -> str:
    """Between what numbers log Z stays."""
    values = [value for row in rows for value in row["log_partition"] if value is not None]
    return f"It stays between {min(values):.1f} and {max(values):.1f}.\n"


def outputs_words(rows: Sequence[Row]) -> str:
    """Whether log Z drifts where nothing decays, and who ends where at the smaller rate."""
    values = [value for row in rows for value in row["log_partition_over_steps"] if value is not None]
    best: dict[str, Row] = {}
    for row in rows:
        if row["score"] is not None and (row["method"] not in best or row["score"] < best[row["method"]]["score"]):
            best[row["method"]] = row
    order = sorted(best.values(), key=lambda row: row["score"])
    ends = _listed(f"{COLUMNS[row['method']]} at {row['score']:.2f}" for row in order)
    drift = "could not provoke it" if min(values) > 0 else "provoked it"
    return (
        f"We {drift}: log Z stays between {min(values):.1f} and {max(values):.1f}. Without decay the better run of "
        f"each ends in this order: {ends}.\n"
    )


# ---- larger models, other plans


def sizes_words(rows: Sequence[Row]) -> str:
    """Who is first at each size, and how much of the text the runs see."""
    said = []
    for row in rows:
        methods = row["methods"]
        order = sorted(methods, key=lambda m: methods[m]["score"])
        size = f"{row['parameters'] / 1e6:.1f} M parameters"
        others = [m for m in order if m != "gso"]
        if "gso" not in methods or not others:
            continue
        margin = 1 - methods["gso"]["score"] / methods[others[0]]["score"]
        stands = "ahead of" if margin > 0 else "behind"
        said.append(
            f"- {size}, {row['steps']} steps: GSO at its default is {_share(margin)} {stands} {COLUMNS[others[0]]}, "
            f"the best of the others.{_at_an_end(row)}\n"
        )
    seen = plan.BATCH * plan.CONTEXT
    parts = _listed(f"{100 * steps * seen / plan.CHARACTERS:.1f} %" for steps in sorted({row["steps"] for row in rows}))
    steps = _listed(str(steps) for steps in sorted({row["steps"] for row in rows}))
    return (
        "".join(said) + f"\nA step sees {seen:,} characters, so runs of {steps} steps see {parts} of the text. What "
        "holds after ten times as many steps is open.\n"
    )


def _at_an_end(row: Row) -> str:
    """Which methods are best at an end of the rates that were tried."""
    ends = [
        COLUMNS[method]
        for method, rates in row["rates"].items()
        if len(rates) > 1 and row["methods"][method]["lr"] in (min(rates), max(rates))
    ]
    return f" {_listed(ends)}: best at an end of the rates that were tried." if ends else ""


def short_words(rows: Sequence[Row]) -> str:
    """GSO at its default and at half of it, beside Muon."""
    default, half = plan.RATES["gso"][0], plan.RATES["gso"][0] / 2
    said = []
    for parameters in sorted({row["parameters"] for row in rows}):
        held = {(row["method"], row["lr"]): row["score"] for row in rows if row["parameters"] == parameters}
        muon = next((score for (method, _), score in held.items() if method == "muon"), None)
        pairs = [("its default", held.get(("gso", default))), ("half of it", held.get(("gso", half)))]
        if muon is None or any(score is None for _, score in pairs):
            continue
        words = _listed(f"{100 * (1 - score / muon):+.1f} % at {name}" for name, score in pairs if score is not None)
        said.append(f"- {parameters / 1e6:.1f} M parameters: {words}.\n")
    return "What GSO gains (+) or loses (-) against Muon:\n\n" + "".join(said)


def strategies_words(rows: Sequence[Row]) -> str:
    """The largest gain of any other plan over rows."""
    gains = {}
    for row, higher in zip(rows, (False, True), strict=True):
        rows_score = row["plans"]["gso"]["median"]
        for name, found in row["plans"].items():
            if name != "gso" and found is not None:
                gains[name, row["workload"]] = (1 if higher else -1) * (found["median"] - rows_score) / rows_score
    best, worst = max(gains.values()), min(gains.values())
    return (
        f"Beside rows, the best of the other plans in these {len(gains)} cells changes the median by {100 * best:+.1f} "
        f"%, the worst by {100 * worst:+.1f} %.\n"
    )
