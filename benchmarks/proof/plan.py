"""Which runs the proof consists of: the rows of the one table, the rates that are tried, groups of runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.proof.store import done
from gradsplit.lab import workload
from gradsplit.lab.methods import METHODS

CHOOSING, FRESH = 1000, (0, 1, 2)


@dataclass(frozen=True)
class Job:
    """One run: a workload with its options, a method, a rate, a seed."""

    workload: str
    steps: int
    method: str
    lr: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "linear"

    @property
    def cell(self) -> str:
        """What seeds share."""
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.workload}{options} {self.steps} {self.schedule} {self.method} lr={self.lr:.4g}"

    @property
    def key(self) -> str:
        """The name under which the run is stored."""
        return f"{self.cell} seed={self.seed}"


# ---- rates: the first is the method's usual one; the others stand where small nets want them

RATES = {
    "gso": (0.03, 0.015, 0.06),
    "adamw+clip1+warmup": (1e-3, 3e-3, 1e-2, 3e-2),
    "muon": (0.02, 0.01, 0.05, 0.1),
    "soap": (3e-3, 1e-3, 1e-2, 3e-2),
    "schedulefree": (2.5e-3, 5e-3, 1e-2, 3e-2),
    "lion": (1e-4, 3e-4, 1e-3, 3e-3),
    "prodigy": (1.0, 0.3, 3.0),
    "lamb": (1e-3, 3e-3, 1e-2, 3e-2),
}
NARROW = {  # three rates each, for the workloads that came last
    "gso": (0.03,),
    "adamw+clip1+warmup": (1e-3, 3e-3, 1e-2),
    "muon": (0.02, 0.01, 0.05),
    "soap": (3e-3, 1e-3, 1e-2),
}
STRONGEST = ("gso", "adamw+clip1+warmup", "muon", "soap")
OTHERS = tuple(name for name in RATES if name not in STRONGEST)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    workload: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def job(self, method: str, lr: float, seed: int, schedule: str = "linear") -> Job:
        """A run of this row."""
        return Job(self.workload, self.steps, method, lr, seed, self.options, schedule)


CASES = {  # the names are those of the groups
    "spoken-digits": Case("spoken digits", "spoken-digits", 300),
    "fashion-resnet": Case("fashion, ResNet", "fashion-resnet", 300),
    "fashion-vit": Case("fashion, ViT", "fashion-vit", 300),
    "sentences": Case("sentences", "sentences", 300),
    "diffusion": Case("diffusion", "diffusion", 300),
    "control": Case("control", "control", 960),
    "adapters": Case("adapters", "adapters", 200),
    "experts": Case("experts", "experts", 200),
    "exploding-detector": Case("detector, exploding", "detection", 500),
    "healthy-detector": Case("detector, healthy", "detection", 500, {"healthy": True}),
    "photographs": Case("photographs", "aerial", 500),
    "plain-12": Case("plain stack, 12 layers", "plain-stack", 350),
    "plain-36": Case("plain stack, 36 layers", "plain-stack", 350, {"depth": 36}),
    "plain-146": Case("plain stack, 146 layers", "deep-stack", 300),
    "hot-stack": Case("hot residual stack", "residual-stack", 900),
    "cool-stack": Case("cool residual stack", "residual-stack", 900, {"gain": 0.5}),
    "gpt-12": Case("GPT, 12 layers", "gpt", 300, {"layers": 12, "width": 48}),
    "gpt-zero": Case("GPT, projections at zero", "gpt", 500, {"zero": True}),
}
FULL = ("spoken-digits", "fashion-resnet", "fashion-vit", "sentences")  # have the full grid
UNSEEN = ("spoken-digits", "sentences", "diffusion", "control", "experts")  # no constant of GSO was chosen with them
CHEAP = (*FULL, "diffusion", "control", "exploding-detector", "healthy-detector", "plain-12")
LARGE: dict[str, tuple[int, dict[str, Any]]] = {
    "1 M": (400, {"text": "sotu.txt", "layers": 4, "width": 144}),
    "3 M": (150, {"text": "sotu.txt", "layers": 6, "width": 208}),
    "10 M": (150, {"text": "sotu.txt", "layers": 8, "width": 320, "heads": 8}),
}
LARGE_RATES = {  # tried at 1 M; the best one goes on to the larger ones
    "gso": (0.03,),
    "adamw+clip1+warmup": (3e-3, 1e-3, 1e-2),
    "muon": (0.02, 0.05),
    "soap": (1e-2, 3e-3),
}
BATCH, CONTEXT = 16, 64  # windows a step and characters a window: the GPT's own
CHARACTERS = 10_760_274  # of sotu.txt
MORE_RATES = {"10 M": {"adamw+clip1+warmup": (1e-3, 3e-4)}}  # beside the best one at 1 M
SIZES: dict[str, tuple[int, dict[str, Any]]] = {  # of the sensitivity
    "22 k": (200, {"layers": 1, "width": 32}),
    "160 k": (200, {"layers": 3, "width": 64}),
    "1 M": (100, {"layers": 4, "width": 144}),
}
SENSITIVE = ("gso", "adamw+clip1+warmup", "muon")
AROUND = tuple(10**power for power in (-1.25, -0.75, -0.25, 0.25, 0.75, 1.25))  # a factor of 316


def rates_of(name: str, method: str) -> tuple[float, ...]:
    """The rates that are tried with a method in a row, the usual one first."""
    return RATES[method] if name in FULL or method not in NARROW else NARROW[method]


def choosing(names: Iterable[str], methods: Iterable[str], schedule: str = "linear") -> list[Job]:
    """Every method at every rate on the seed that chooses."""
    methods = tuple(methods)
    return [
        CASES[name].job(method, lr, CHOOSING, schedule)
        for name in names
        for method in methods
        for lr in rates_of(name, method)
    ]


def confirming(
    names: Iterable[str], methods: Iterable[str], seeds: tuple[int, ...] = FRESH, schedule: str = "linear"
) -> list[Job]:
    """The best cell of each method on fresh seeds; GSO's is its default, whatever the choosing seed says."""
    finished, methods, jobs = done(), tuple(methods), []
    for name in names:
        for method in methods:
            best = best_rate(finished, name, method, schedule)
            if best is not None:
                jobs += [CASES[name].job(method, best, seed, schedule) for seed in seeds]
    return jobs


def tried(finished: Mapping[str, Any], name: str, method: str, schedule: str = "linear") -> dict[float, dict[str, Any]]:
    """Rate -> the run on the choosing seed, for all rates that have run, those of `edges` too."""
    case = CASES[name]
    asked = (case.workload, case.steps, dict(case.options), method, schedule, CHOOSING)
    keys = ("workload", "steps", "options", "method", "schedule", "seed")
    return {row["lr"]: row for row in finished.values() if tuple(row[key] for key in keys) == asked}


def best_rate(finished: Mapping[str, Any], name: str, method: str, schedule: str = "linear") -> float | None:
    """The rate with the best score on the choosing seed; GSO's default; None: not all rates have run."""
    held = tried(finished, name, method, schedule)
    if any(lr not in held for lr in rates_of(name, method)):
        return None
    if method == "gso":
        return RATES["gso"][0]
    return max(held, key=lambda lr: _worth(CASES[name].workload, held[lr]))


def edges(names: Iterable[str], methods: Iterable[str], schedule: str = "linear") -> list[Job]:
    """One rate further where the best one is the largest or the smallest that was tried."""
    finished, methods, jobs = done(), tuple(methods), []
    for name in names:
        for method in methods:
            best = best_rate(finished, name, method, schedule)
            if best is None or method == "gso":
                continue
            rates = tried(finished, name, method, schedule)
            for edge, factor in ((max(rates), 3.0), (min(rates), 1 / 3)):
                if best == edge:
                    jobs.append(CASES[name].job(method, float(f"{best * factor:.2g}"), CHOOSING, schedule))
    return jobs


def _worth(name: str, row: Mapping[str, Any]) -> float:
    """A score of which more is better."""
    if row["score"] is None or row["diverged"]:
        return -math.inf
    return row["score"] if workload(name).higher_is_better else -row["score"]


def _sensitivity() -> list[Job]:
    return [sensitive(size, method, factor) for size in SIZES for method in SENSITIVE for factor in AROUND]


def sensitive(size: str, method: str, factor: float) -> Job:
    """A GPT of that size at a factor of the method's usual rate, or at its largest rate."""
    steps, options = SIZES[size]
    return Job("gpt", steps, method, min(RATES[method][0] * factor, METHODS[method].largest_lr), CHOOSING, options)


OUTPUTS: tuple[tuple[str, float], ...] = (
    *(("adamw+clip1+warmup", lr) for lr in (1e-2, 1e-1)),
    *(("gso", lr) for lr in (0.03, 0.3)),
    *(("muon", lr) for lr in (0.02, 0.2)),
)


def _outputs() -> list[Job]:
    """Whether output logits drift: no decay, no schedule, 3,000 steps, the log of their partition function watched."""
    options = SIZES["22 k"][1] | {"decay": 0.0, "watch": 300}
    return [Job("gpt", 3000, method, lr, CHOOSING, options, "constant") for method, lr in OUTPUTS]


PLANS = ("gso", "gso-tensors", "gso-lbf", "gso-tree", "gso-lbf-blocks")
HOT_PARTS: tuple[tuple[str, int, dict[str, Any]], ...] = (("experts", 200, {"hot": 8.0}), ("detection", 300, {}))


def _strategies() -> list[Job]:
    return [
        Job(name, steps, method, 0.03, seed, options)
        for seed in FRESH
        for name, steps, options in HOT_PARTS
        for method in PLANS
    ]


def large(size: str) -> list[Job]:
    """The smallest of the larger GPTs at all rates; the others at the rates that were best there."""
    steps, options = LARGE[size]
    if size == "1 M":
        return [
            Job("gpt", steps, method, lr, CHOOSING, options) for method, rates in LARGE_RATES.items() for lr in rates
        ]
    more = MORE_RATES.get(size, {})
    return [
        Job("gpt", steps, method, lr, CHOOSING, options)
        for method, best in large_rates().items()
        for lr in (best, *more.get(method, ()))
    ]


def large_rates() -> dict[str, float]:
    """Method -> its best rate at 1 M."""
    finished, (steps, options) = done(), LARGE["1 M"]
    chosen = {}
    for method, rates in LARGE_RATES.items():
        held = {lr: finished.get(Job("gpt", steps, method, lr, CHOOSING, options).key) for lr in rates}
        ended = {lr: row for lr, row in held.items() if row is not None}
        if ended:
            chosen[method] = max(ended, key=lambda lr: _worth("gpt", ended[lr]))
    return chosen


SHORT: tuple[tuple[str, float], ...] = (("gso", 0.015), ("gso", 0.03), ("gso", 0.06), ("muon", 0.05))


def short() -> list[Job]:
    """150 steps at all sizes: whether the size or the length of a run decides between GSO and Muon."""
    steps = LARGE["3 M"][0]
    return [
        Job("gpt", steps, method, lr, CHOOSING, LARGE[size][1])
        for size in ("10 M", "3 M", "1 M")
        for method, lr in SHORT
        if size == "1 M" or lr != 0.06  # the largest share lost at 1 M
    ]


def _of(method: str, group: Callable[[], list[Job]]) -> list[Job]:
    """The jobs of a group that belong to one method."""
    return [job for job in group() if job.method == method]


WIDE = {"text": "sotu.txt", "layers": 2, "width": 208}


def width() -> list[Job]:
    """Whether short rows may count as less in wide matrices: with and without it, and half the share without it."""
    steps = LARGE["3 M"][0]
    ways = (("gso-columns", 0.03), ("gso", 0.03), ("gso-columns", 0.015))
    jobs = [Job("gpt", steps, method, lr, seed, WIDE) for seed in (10, 11) for method, lr in ways]
    ways = (("gso-columns", 0.03), ("gso", 0.03), ("muon", 0.05))
    return jobs + [Job("gpt", steps, method, lr, 10, LARGE["3 M"][1]) for method, lr in ways]


GROUPS: dict[str, Callable[[], list[Job]]] = {
    "first": partial(choosing, CASES, STRONGEST),
    "edges": partial(edges, CASES, RATES),
    "confirm": partial(confirming, CASES, RATES),
    "others": partial(choosing, CHEAP, OTHERS),
    "cosine": partial(choosing, FULL[:1], STRONGEST, "cosine"),
    "edges-cosine": partial(edges, FULL[:1], STRONGEST, "cosine"),
    "confirm-cosine": partial(confirming, FULL[:1], STRONGEST, FRESH, "cosine"),
    "sensitivity": _sensitivity,
    "outputs": _outputs,
    "large-short": short,
    "width": width,
    "strategies": _strategies,
    **{f"first-{name}": partial(choosing, [name], STRONGEST) for name in CASES},
    **{f"others-{name}": partial(choosing, [name], OTHERS) for name in CASES},
    **{f"edges-{name}": partial(edges, [name], RATES) for name in CASES},
    **{f"confirm-{name}": partial(confirming, [name], RATES) for name in CASES},
    **{f"large-{size.replace(' ', '')}": partial(large, size) for size in LARGE},
    **{f"large-10M-{method}": partial(_of, method, partial(large, "10 M")) for method in LARGE_RATES},
}
