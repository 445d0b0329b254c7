"""Which samples of the batch stood out at the first departure, in sentences; what `gradsplit run --samples` kept.

A departure that is laid to the weights or to the learning rate names no sample, and neither does slow growth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .origin import Departure

__all__ = [
    "SAMPLE_GLOSSARY",
    "SAMPLE_HEADINGS",
    "SampleRow",
    "SampleReading",
    "inputs_sentences",
    "look_at",
    "readings_of",
    "sample_rows",
    "samples_at",
    "samples_sentences",
]

NAMED = 6  # samples that a sentence names
_MADE_BY_SAMPLES = ("history", "backward", "forward", "input", "batch", "loss", "loss_lost", "norm", "loss_rose")


class SampleRow(NamedTuple):
    """One sample that stood out: in which backward pass of the step, where in its batch, in which layer, by how much.

    ``ratio`` is over the upper quarter of its batch; nan: not finite.
    """

    pass_: int
    sample: int
    layer: str
    ratio: float
    num_layers: int


@dataclass(frozen=True)
class SampleReading:
    """The samples of one step, see `gradsplit.sources.standing.Reading`.

    Attributes:
        rank: of the process whose batch it was.
        step: the optimizer's step.
        row: in its stream.
        rows: samples that stood out, most first.
        num: how many did.
        num_passes: backward passes of the step.
        batch: samples of its batch.
        why: why there is none.
        times: of a batch that was unlike as a whole.
        unruled: parameters whose layers have no rule.
        num_unruled: how many.
        by: "gradient", or "input" where the samples stood out by what the first layer was given.
    """

    rank: int
    step: int
    row: int
    rows: tuple[SampleRow, ...]
    num: int
    num_passes: int
    batch: int
    why: str
    times: float
    unruled: tuple[str, ...]
    num_unruled: int
    by: str = "gradient"


def readings_of(remarks: Sequence[Mapping[str, Any]], rank: int) -> tuple[SampleReading, ...]:
    """Return what a process recorded about its samples, in the order of steps."""
    return tuple(
        SampleReading(
            rank,
            int(one.get("step", 0)),
            int(one.get("row", 0)),
            tuple(
                SampleRow(int(k), int(i), str(layer), math.nan if ratio is None else float(ratio), int(num))
                for k, i, layer, ratio, num in one.get("rows", [])
            ),
            int(one.get("num", 0)),
            int(one.get("num_passes", 1)),
            int(one.get("batch", 0)),
            str(one.get("why", "")),
            float(one.get("times", 1.0)),
            tuple(one.get("unruled", [])),
            int(one.get("num_unruled", 0)),
            str(one.get("by", "gradient")),
        )
        for one in remarks
        if one.get("kind") == "samples"
    )


def samples_at(
    first: Departure, rows: range, own: Sequence[SampleReading], others: Sequence[SampleReading]
) -> tuple[SampleReading, ...]:
    """Return the readings that explain a departure; of several ranks those in which samples stood out.

    Args:
        first: the departure.
        rows: its rows in the series.
        own: readings of the file it is in.
        others: readings of the other ranks.
    """
    if first.kind not in _MADE_BY_SAMPLES:
        return ()
    here = [one for one in own if rows.start - first.skipped_before <= one.row < rows.stop]
    best = next((one for one in here if one.rows), here[0] if here else None)
    steps = range(first.step - 1, first.last_step + 2)
    there = {one.rank: one for one in others if one.rows and one.step in steps}
    if there and (best is None or not best.rows):
        return tuple(there.values())
    return (() if best is None else (best,)) + tuple(there.values())


def _listed(words: Sequence[str]) -> str:
    """Words with commas and an "and"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _which(one: SampleReading, *, large: bool) -> str:
    """Samples 3 and 17 of the batch of step 240; with several backward passes, of which of them."""
    parts = []
    rows = sorted(one.rows[:NAMED], key=lambda row: (row.pass_, row.sample))
    for number, group in itertools.groupby(rows, key=lambda row: row.pass_):
        samples = [str(row.sample) for row in group]
        word = "samples" if len(samples) > 1 else "sample"
        of = "the batch" if one.num_passes <= 1 else f"micro-batch {number}"
        parts.append(f"{word} {_listed(samples)} of {of}")
    said = f"{_listed(parts)} of step {one.step}" + (f" on rank {one.rank}" if one.rank else "")
    return said[0].upper() + said[1:] if large else said


def _batch(one: SampleReading) -> str:
    which = "the batch" if one.num_passes <= 1 else f"the {one.num_passes} micro-batches"
    return f"{which} of step {one.step}" + (f" on rank {one.rank}" if one.rank else "")


def samples_sentences(found: Sequence[SampleReading]) -> list[str]:
    """Say which samples stood out, where and by how much; or why none is named."""
    said = []
    for one in found:
        if one.rows:
            top = one.rows[0]
            layer = top.layer if " " in top.layer else f"layer {top.layer}"
            lost = math.isnan(top.ratio)
            how = f"most in {layer}, {top.ratio:.3g} times the usual sample"
            if lost or one.by == "input":
                how = f"not finite, first in {layer}" if lost else _input(one)
            more = f" and {one.num - NAMED} more" if one.num > NAMED else ""
            them = "it" if one.num == 1 else "them"
            said.append(
                f"{_which(one, large=True)}{more} stood out ({how}): look at {them}; gs.SampleSplitter bounds such "
                "samples."
            )
        else:
            said.append(_none(one))
    if found and found[0].unruled and found[0].why != "unseen":
        names = ", ".join(found[0].unruled[:3]) + (", …" if found[0].num_unruled > 3 else "")
        several = "parameters whose layers have" if found[0].num_unruled > 1 else "parameter whose layer has"
        said.append(
            f"The samples were not looked at in {found[0].num_unruled} {several} no rule, or did not run where it "
            f"can be seen: {names}."
        )
    return said


def _input(one: SampleReading) -> str:
    top = one.rows[0]
    layer = top.layer if " " in top.layer else f"layer {top.layer}"
    return f"the input of {layer}, {top.ratio:.3g} times the usual one"


def inputs_sentences(readings: Sequence[SampleReading], told: Sequence[SampleReading]) -> list[str]:
    """Say which samples had an input far beyond their batch, apart from those of the first departure.

    Args:
        readings: all of a stream.
        told: those of the first departure, which are said elsewhere.
    """
    steps = {one.step for one in told if one.rows}
    found = [one for one in readings if one.rows and one.by == "input" and one.step not in steps]
    if not found:
        return []
    more = f", and samples of {len(found) - 3} more steps" if len(found) > 3 else ""
    named = _listed([f"{_which(one, large=k == 0)} ({_input(one)})" for k, one in enumerate(found[:3])])
    return [
        f"{named}{more} stood out by the input alone: look at the data. In front of BatchNorm no norm shows such a "
        "sample; gs.SampleSplitter puts it in quarantine."
    ]


def _none(one: SampleReading) -> str:
    nobody = f"No sample of {_batch(one)} stood out"
    return {
        "none": f"{nobody}: they were alike. Look at the weights, the rate and the loss.",
        "whole": f"{nobody}: the whole batch was {one.times:.3g} times as large as those before.",
        "all": f"{nobody}: not one was finite. The weights, or what the samples share, were lost before.",
        "one": f"No sample can stand out in {_batch(one)}: it has one sample, or no dimension of samples.",
        "gone": f"The samples of {_batch(one)} were no longer kept when its row was read.",
        "failed": f"The samples of {_batch(one)} were not seen, since looking at them had failed before.",
    }.get(one.why, f"The samples of {_batch(one)} were not seen: no layer with a rule ran outside of a compiled graph.")


def look_at(found: Sequence[SampleReading]) -> str:
    """The remedy for samples that stood out, as advice; empty where none did."""
    named = [one for one in found if one.rows]
    if not named:
        return ""
    which = _listed([_which(one, large=False) for one in named])
    return (
        f"Look at {which} in the data. In the script, gs.SampleSplitter(model).attach(optimizer) bounds such samples "
        "and leaves out those that are not finite."
    )


SAMPLE_HEADINGS = ["step", "pass", "sample", "layer", "times the usual", "in layers"]


def sample_rows(readings: Sequence[SampleReading], most: int = 60) -> list[list[str]]:
    """Return table rows of all samples that stood out, oldest first."""
    return [
        [
            str(one.step) + (f" (rank {one.rank})" if one.rank else ""),
            str(row.pass_),
            str(row.sample),
            row.layer,
            f"{row.ratio:.3g}" if math.isfinite(row.ratio) else "not finite",
            str(row.num_layers),
        ]
        for one in readings
        for row in one.rows
    ][:most]


SAMPLE_GLOSSARY: dict[str, str] = {
    "Samples … of the batch of step … stood out": (
        "What these samples add to the gradient of a layer was far above the rest of their batch and above the batches "
        "before. The usual sample is the upper quarter of the batch. Samples are counted from 0 in the script's own "
        "batch. With gradient accumulation the micro-batch is named; it is counted from 0 in its step."
    ),
    "… stood out (not finite, first in layer …)": (
        "The input or the signal of this layer was inf, nan or beyond 1e19 for these samples and finite for the rest. "
        "No layer before it had such a value."
    ),
    "… stood out (the input of layer …, … times the usual one)": (
        "The first layer was given at least a hundred times the upper quarter of the batch for this sample, and ten "
        "times what is usual. Inputs are looked at where no sample stands out by the gradient: in front of "
        "BatchNorm such a sample spoils the statistic, and no gradient is large."
    ),
    "No sample of the batch of step … stood out: they were alike": (
        "All samples of the batch had the usual share of the gradient, so no single one explains the step."
    ),
    "No sample of the batch of step … stood out: the whole batch was … times as large": (
        "The input of the first layer was that much larger for the median sample. Look at the scale of the batch."
    ),
    "No sample of the batch of step … stood out: not one was finite": (
        "Every sample was inf or nan where the first one was. Weights that are not finite do that, and a statistic of "
        "the batch such as that of BatchNorm."
    ),
    "No sample can stand out in the batch of step …": (
        "It held one sample, or tensors without a dimension of samples: there is nothing to compare with."
    ),
    "The samples of the batch of step … were not seen": (
        "Hooks see layers that run in ordinary Python. A model that model.compile() compiled in place shows none, and "
        "one from torch.compile(model) is seen as one layer."
    ),
    "The samples of the batch of step … were no longer kept": (
        "The norms of the last passes are kept, up to 64 megabytes. This step was out of it before its row was read."
    ),
    "The samples were not looked at in … parameters": (
        "Linear, Conv, Embedding, LayerNorm, RMSNorm, recurrent nets and attention have a rule. Other layers have none."
    ),
}
"""Sentence about samples -> what it means."""
