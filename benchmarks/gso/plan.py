"""Which runs the trials of GSO consist of: groups of jobs, one question each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["CHOOSING", "DETECTOR", "FRESH", "GPT", "GROUPS", "HOT", "MAIN", "MIXER", "SHARE", "Job", "cells"]

Pairs = tuple[tuple[str, Any], ...]
CHOOSING, FRESH = (0, 1), (10, 11, 12, 13, 14, 15)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: a name of the registry, "mixer" or "lora".
        steps: updates.
        method: a name of the driver's `METHODS`.
        lr: the rate, or the share.
        seed: of weights and batches.
        schedule: "linear" (to zero), "cosine" (to 1 %) or "constant".
        options: of the task.
        method_options: of the method.
        fault: kind and rate, or kind and number of first steps.
    """

    task: str
    steps: int
    method: str
    lr: float
    seed: int
    schedule: str = "linear"
    options: Pairs = ()
    method_options: Pairs = ()
    fault: Pairs = ()

    @property
    def cell(self) -> str:
        """What seeds share."""
        parts = [self.task, str(self.steps), self.schedule, self.method, f"lr={self.lr:g}"]
        for title, pairs in (("task", self.options), ("method", self.method_options), ("fault", self.fault)):
            if pairs:
                parts.append(f"{title}({', '.join(f'{name}={value}' for name, value in pairs)})")
        return " ".join(parts)

    @property
    def key(self) -> str:
        """The name under which the run is stored."""
        return f"{self.cell} seed={self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """The setting as JSON takes it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _mapping(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _mapping(pairs: Pairs) -> dict[str, Any]:
    """Pairs as JSON takes them, which knows no infinity."""
    return {
        name: _mapping(value) if isinstance(value, tuple) else "inf" if value == float("inf") else value
        for name, value in pairs
    }


def frozen_pairs(values: dict[str, Any]) -> Pairs:
    """A mapping as pairs, mappings within it too."""
    return tuple((name, frozen_pairs(value) if isinstance(value, dict) else value) for name, value in values.items())


def cells(task: str, steps: int, method: str, lr: float, seeds: Iterable[int], **parts: Any) -> list[Job]:
    """The same setting under several seeds; `options`, `method_options` and `fault` are given as mappings."""
    frozen = {name: frozen_pairs(value) if isinstance(value, dict) else value for name, value in parts.items()}
    return [Job(task, steps, method, lr, seed, **frozen) for seed in seeds]


SHARE = 0.03
GPT = ("gpt", 500, "reference", SHARE)
HOT = ("residual-stack", 900, "reference", SHARE)
DETECTOR = ("detection", 500, "reference", SHARE)
LSTM = ("lstm", 500, "reference", SHARE)
MIXER = ("mixer", 600)
MAIN = ("gpt", 1000)
OURS = {"median": "tensors", "free_outputs": True}
KINDS = ("batch", "nan", "row", "layer", "huge")


def _timing() -> list[Job]:
    jobs = []
    for task, steps in (("gpt", 100), ("lstm", 50), ("detection", 50), ("residual-stack", 50), ("mixer", 50)):
        for method, lr in (("reference", SHARE), ("adamw", 3e-3)):
            jobs += cells(task, steps, method, lr, (0,))
    for method, lr in (("muon", 0.02), ("soap", 3e-3), ("lamb", 1e-2), ("prodigy", 1.0), ("schedulefree", 1e-2)):
        jobs += cells("gpt", 100, method, lr, (0,))
    return jobs


def _collective() -> list[Job]:
    slow, tensors, exact = {"median": "exact", "rule": "slow"}, {"median": "tensors"}, {"median": "exact"}
    jobs = cells(*GPT, (0, 1), method_options=slow)
    for options in (tensors, {}):
        jobs += cells(*GPT, (0, 1), method_options=options, fault={"kind": "batch", "rate": 0.05})
        jobs += cells(*GPT, (0,), method_options=options, fault={"kind": "batch10", "rate": 0.05})
    jobs += cells(*GPT, (0, 1), method_options=tensors)
    jobs += cells(*GPT, (0,), method_options=tensors, fault={"kind": "batch", "rate": 0.2})
    jobs += cells(*GPT, (0,), method_options=tensors, fault={"kind": "batch", "first": 3})
    for kind in KINDS[1:]:
        jobs += cells(*GPT, (0,), fault={"kind": kind, "rate": 0.05})
    jobs += cells(*GPT, (0,), method_options=exact, fault={"kind": "batch", "rate": 0.05})
    for kind in KINDS[1:]:
        jobs += cells(*GPT, (0,), method_options=tensors, fault={"kind": kind, "rate": 0.2})
    jobs += cells(*HOT, (0, 1), method_options=tensors)
    for kind in KINDS:
        jobs += cells(*GPT, (0,), method_options=tensors, fault={"kind": kind, "rate": 0.01})
    return jobs


def _collective_elsewhere() -> list[Job]:
    jobs = []
    for setting in (LSTM, DETECTOR):
        for options in ({}, {"median": "tensors"}):
            jobs += cells(*setting, (0,), method_options=options)
            jobs += cells(*setting, (0,), method_options=options, fault={"kind": "batch", "rate": 0.05})
    return jobs


def _scaled_detector() -> list[Job]:
    jobs = []
    for seed in (1, 10, 11, 12):
        for options in ({}, {"median": "tensors"}):
            jobs += cells(*DETECTOR, (seed,), method_options=options, fault={"kind": "batch", "rate": 0.05})
        jobs += cells(*DETECTOR, (seed,), method_options={})
    return jobs


def _growth() -> list[Job]:
    jobs = []
    infinity = float("inf")
    for setting in (DETECTOR, LSTM):
        for options in ({}, {"free_outputs": True}, {"limit": infinity}, {"limit": 5.0}):
            jobs += cells(*setting, (0, 1), method_options=options)
    for options in ({}, {"free_outputs": True}):
        jobs += cells(*DETECTOR, (0, 1), options={"healthy": True}, method_options=options)
        jobs += cells(*MIXER, "reference", SHARE, (0, 1), method_options=options)
        jobs += cells(*LSTM, (10, 11, 12), method_options=options)
    jobs += cells(*GPT, (0, 1), method_options={"free_outputs": True})
    jobs += cells(*HOT, (0, 1), method_options={"free_outputs": True})
    return jobs


def _stacks() -> list[Job]:
    jobs = cells(*HOT, (0, 1), method_options={"limit": 5.0, "free_outputs": True})
    for options in ({"free_outputs": True}, OURS):
        jobs += cells(*HOT, (0, 1), options={"gain": 0.5}, method_options=options)
        jobs += cells("plain-stack", 350, "reference", SHARE, (0, 1), method_options=options)
    return jobs


def _newton_schulz() -> list[Job]:
    jobs = []
    for coefficients in ("muon4", "muon3", "polar5"):
        jobs += cells(*GPT, (0, 1), method_options={"coefficients": coefficients})
    for coefficients in ("muon4", "muon3"):
        jobs += cells(*GPT, (0, 1), method_options={"coefficients": coefficients, "tight": True})
    jobs += cells(*GPT, (0, 1), method_options={"tight": True})
    for options in ({"coefficients": "polar4"}, {"coefficients": "polar3"}, {"dtype": "bfloat16"}):
        jobs += cells(*GPT, (0,), method_options=options)
    jobs += cells(*GPT, (1, 2), method_options={"coefficients": "polar3"})
    jobs += cells(*GPT, (1,), method_options={"coefficients": "polar4"})
    jobs += cells(*GPT, (2,))
    for coefficients in ("polar3", "muon4"):
        jobs += cells(*LSTM, (0, 1), method_options={"coefficients": coefficients})
        jobs += cells(*DETECTOR, (0, 1), method_options={"coefficients": coefficients})
    jobs += cells(*HOT, (0,), method_options={"coefficients": "polar3"})
    return jobs


def _small_data() -> list[Job]:
    jobs = []
    for lr in (0.03, 0.02, 0.01, 0.005):
        jobs += cells(*MIXER, "reference", lr, (0, 1))
    for lr in (1e-3, 3e-3, 1e-2):
        jobs += cells(*MIXER, "adamw", lr, (0, 1))
    return jobs


def _blocks() -> list[Job]:
    jobs = cells(*LSTM, (0, 1), method_options={"blocks": {"lstm.weight_ih_l0": 4, "lstm.weight_hh_l0": 4}})
    jobs += cells(*GPT, (0,), method_options={"blocks": {"qkv.weight": 3}})
    jobs += cells(*GPT, (0,), method_options={"blocks": {"qkv.weight": 12}})
    return jobs


def _vectors() -> list[Job]:
    jobs = []
    for options in ({"vector": 0.1}, {"vector": 1.0}, {"vectors": "plain", "vector": 1.0}):
        for setting in (DETECTOR, LSTM):
            jobs += cells(*setting, (0, 1), method_options=options)
    jobs += cells(*GPT, (0,), method_options={"vector": 1.0})
    return jobs


def _main() -> list[Job]:
    jobs = cells(*MAIN, "reference", SHARE, (*FRESH[:3], 0), method_options=OURS)
    for lr in (1e-2, 3e-2, 3e-3, 2e-2, 1e-1, 1e-3):
        jobs += cells(*MAIN, "adamw", lr, (0,))
    for lr in (0.03, 0.02, 0.01):
        for adam in (1e-2, 3e-2, 3e-3):
            jobs += cells(*MAIN, "muon", lr, (0,), method_options={"adam": adam})
    jobs += cells(*MAIN, "muon", 0.1, (0,), method_options={"adam": 1e-2})
    return jobs


def _others() -> list[Job]:
    jobs = []
    for lr in (1e-2, 3e-3, 3e-2):
        jobs += cells(*MAIN, "schedulefree", lr, (0,))
        jobs += cells(*MAIN, "soap", lr, (0,))
        jobs += cells(*MAIN, "lamb", lr, (0,))
    for lr in (1.0, 0.3, 3.0):
        jobs += cells(*MAIN, "prodigy", lr, (0,))
    return jobs


def _elsewhere() -> list[Job]:
    jobs = cells(*DETECTOR, FRESH, method_options=OURS)
    jobs += cells(*LSTM, FRESH[:3], method_options=OURS)
    jobs += cells(*DETECTOR, FRESH[:3], options={"healthy": True}, method_options=OURS)
    jobs += cells("plain-stack", 350, "reference", SHARE, FRESH[:3], method_options=OURS)
    for task, steps in (("lstm", 500), ("detection", 500), ("plain-stack", 350)):
        for lr in (1e-3, 3e-3, 1e-2, 3e-2):
            jobs += cells(task, steps, "adamw", lr, (0,))
    for lr in (1e-3, 3e-3, 1e-2):
        jobs += cells(*DETECTOR[:2], "adamw", lr, (0,), options={"healthy": True})
    for lr in (0.01, 0.03, 0.1):
        jobs += cells("lstm", 500, "muon", lr, (0,), method_options={"adam": 1e-2})
    return jobs


def _hot() -> list[Job]:
    jobs = cells(*HOT, FRESH, method_options=OURS)
    for lr in (1e-2, 3e-3, 3e-2, 1e-3):
        jobs += cells("residual-stack", 900, "adamw", lr, (0,))
    return jobs


def _shipped() -> list[Job]:
    """`gradsplit.GSO` where the reference has been measured on the same seeds; then the tables of what ships."""
    jobs = []
    for task, steps, _, lr in (DETECTOR, LSTM, GPT, HOT):
        jobs += cells(task, steps, "gso", lr, (0,))
    jobs += cells(*MAIN, "gso", SHARE, FRESH[:3])
    return jobs


def _edges() -> list[Job]:
    """Rates beyond the grid where its last one was the best."""
    jobs = []
    for lr in (6e-2, 1e-1):
        jobs += cells("lstm", 500, "adamw", lr, (0,))
    for lr in (3e-2, 1e-1):
        jobs += cells(*DETECTOR[:2], "adamw", lr, (0,), options={"healthy": True})
    return jobs


def _low_rank() -> list[Job]:
    jobs = []
    for floor in (0.1, 0.03, 0.3, 0.0):
        jobs += cells("lora", 400, "reference", SHARE, (0,), method_options={"floor": floor})
    for lr in (3e-3, 1e-2, 3e-2):
        jobs += cells("lora", 400, "adamw", lr, (0,))
    for floor in (0.1, 0.03, 0.3):
        jobs += cells(*GPT, (0,), options={"zero": True}, method_options={"floor": floor})
    for lr in (3e-3, 1e-2):
        jobs += cells("gpt", 500, "adamw", lr, (0,), options={"zero": True})
    return jobs


def _soap() -> list[Job]:
    """The strongest of the others, on the seeds of the main table, and twice its best rate."""
    jobs = cells(*MAIN, "soap", 2e-2, (0,)) + cells(*MAIN, "soap", 1e-2, FRESH[:3])
    return jobs + cells("lstm", 500, "soap", 1e-2, (0,)) + cells("detection", 500, "soap", 1e-2, (0,))


def _second_text() -> list[Job]:
    text = {"text": "second"}
    jobs = cells(*MAIN, "reference", SHARE, (0, 10), options=text, method_options=OURS)
    jobs += cells(*MAIN, "muon", 0.03, (0, 10), options=text, method_options={"adam": 1e-2})
    for lr in (1e-2, 3e-3, 2e-2):
        jobs += cells(*MAIN, "adamw", lr, (0,), options=text)
    jobs += cells(*MAIN, "adamw", 1e-2, (10,), options=text)
    return jobs


def _low_rank_more() -> list[Job]:
    jobs = cells("lora", 400, "reference", 0.06, (0,)) + cells("lora", 400, "adamw", 1e-1, (0,))
    jobs += cells("lora", 400, "reference", SHARE, (10, 11)) + cells("lora", 400, "adamw", 3e-2, (10, 11))
    return jobs


def _fresh() -> list[Job]:
    jobs = []
    for seed in FRESH[:3]:
        jobs += cells(*MAIN, "muon", 0.03, (seed,), method_options={"adam": 1e-2})
        jobs += cells(*MAIN, "adamw", 1e-2, (seed,))
        jobs += cells("lstm", 500, "adamw", 3e-2, (seed,))
        jobs += cells("detection", 500, "adamw", 3e-3, (seed,))
        jobs += cells("detection", 500, "adamw", 1e-2, (seed,), options={"healthy": True})
        jobs += cells("plain-stack", 350, "adamw", 1e-2, (seed,))
        jobs += cells(*MIXER, "reference", 0.01, (seed,), method_options=OURS)
        jobs += cells(*MIXER, "reference", SHARE, (seed,), method_options=OURS)
        jobs += cells(*MIXER, "adamw", 3e-3, (seed,))
    return jobs


GROUPS: dict[str, list[Job]] = {
    "timing": _timing(),
    "collective": _collective(),
    "collective-elsewhere": _collective_elsewhere(),
    "scaled-detector": _scaled_detector(),
    "growth": _growth(),
    "stacks": _stacks(),
    "newton-schulz": _newton_schulz(),
    "small-data": _small_data(),
    "blocks": _blocks(),
    "vectors": _vectors(),
    "main": _main(),
    "others": _others(),
    "elsewhere": _elsewhere(),
    "hot": _hot(),
    "shipped": _shipped(),
    "edges": _edges(),
    "low-rank": _low_rank(),
    "low-rank-more": _low_rank_more(),
    "soap": _soap(),
    "second-text": _second_text(),
    "fresh": _fresh(),
}
