"""The figures: each a ratio of two programs that ran in turn, beside the bar it is held to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import gradsplit as gs

from .bandwidth import bandwidth
from .layouts import LAYOUTS, parameters_of
from .pairs import Pair, in_turn

__all__ = ["Figure", "step_figures"]

RATE = 1e-5


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what is compared.
        layout: of which tensors.
        value: the ratio, or the number in ``unit``.
        bar: the most it may be; None: shown for comparison only.
        detail: times, ranges, bytes.
    """

    name: str
    layout: str
    value: float
    bar: float | None
    unit: str = "ratio"
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the bar is met: "met" or "not met"; empty without one."""
        return "" if self.bar is None else "met" if self.value <= self.bar else "not met"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and strings."""
        return {**asdict(self), "verdict": self.verdict}


def _figure(
    name: str, layout: str, pair: Pair, bar: float | None, limit_seconds: float | None = None, **more: Any
) -> Figure:
    """Make a figure of a pair; ``limit_seconds`` is what our side would take if only memory set the pace."""
    detail = {**pair.to_dict(), **more}
    if limit_seconds is not None:
        detail |= {"limit_seconds": limit_seconds, "floor": limit_seconds / detail["theirs_median"]}
    return Figure(name, layout, pair.ratio, bar, detail=detail)


def step_figures(layout: str, seconds: float) -> Iterator[Figure]:
    """Yield the figures of one layout, ``seconds`` each."""
    named, sources = parameters_of(LAYOUTS[layout]())
    parameters = [p for _, p in named]
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    small = layout.startswith("small")
    num_bytes = 4 * sum(p.numel() for p in parameters)
    rates = bandwidth(num_bytes // 4)
    reading, scaling = num_bytes / rates["read"], 2 * num_bytes / rates["scale"]

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e9, foreach=True)

    def refill() -> None:
        torch._foreach_copy_(gradients, sources)

    def splitter(budget: Any, plan: Any = "xsp", **more: Any) -> Callable[[], object]:
        return gs.GradientSplitter(named, plan=plan, budget=budget, **more).step

    idle = splitter(gs.Fixed(1e9))
    pair = in_turn(idle, clip, seconds=seconds)
    name = "GradientSplitter, rows, nothing over its limit / clip_grad_norm_(foreach)"
    yield _figure(name, layout, pair, 0.70 if small else 0.35, reading, bins=gs.xsp(gs.layout_of(named)).num_bins)
    if small:
        return
    sgd = torch.optim.SGD(parameters, lr=RATE, momentum=0.9)
    pair = in_turn(splitter(gs.RelativeStep(1e6), optimizer=sgd), clip, seconds=seconds / 2)
    yield _figure("the same with RelativeStep, which reads the weights too", layout, pair, None, 2 * reading)
    pair = in_turn(splitter(gs.Fixed(1e-9)), clip, before=refill, seconds=seconds)
    yield _figure(
        "GradientSplitter, rows, every bin over its limit / clip_grad_norm_(foreach)", layout, pair, 0.85, scaling
    )
    refill()
    yield from _other_plans(layout, named, idle, seconds / 2, reading)
    yield from _updates(layout, parameters, named, clip, seconds, rates)


def _other_plans(
    layout: str, named: Any, idle: Callable[[], object], seconds: float, reading: float
) -> Iterator[Figure]:
    shapes = gs.layout_of(named)
    columns = gs.xsp(shapes, parts=256, axis=1)
    pair = in_turn(gs.GradientSplitter(named, plan=columns, budget=gs.Fixed(1e9)).step, idle, seconds=seconds)
    yield _figure("column bins, 256 a tensor / row bins", layout, pair, 1.5, reading, bins=columns.num_bins)
    boxes = _boxes(shapes)
    pair = in_turn(gs.GradientSplitter(named, plan=boxes, budget=gs.Fixed(1e9)).step, idle, seconds=seconds)
    yield _figure("L-BF-like boxes, 16 x 16 a tensor / row bins", layout, pair, 1.5, reading, bins=boxes.num_bins)


def _boxes(shapes: gs.Layout) -> gs.Plan:
    """Boxes of 16 x 16 cuts a tensor, what L-BF makes of evenly spread energy, without measuring one."""
    import numpy as np

    from gradsplit.plan.boxes import Boxes

    columns: list[list[int]] = []
    for t, (rows, cols) in enumerate(zip(shapes.rows, shapes.cols, strict=True)):
        down, across = (np.unique(np.linspace(0, n, min(n, 16) + 1).astype(int)).tolist() for n in (rows, cols))
        for r0, r1 in itertools.pairwise(down):
            for c0, c1 in itertools.pairwise(across):
                columns.append([t, r0, r1, c0, c1, len(columns)])
    return gs.Plan(shapes, Boxes.from_columns(*np.array(columns).T))


def _updates(
    layout: str, parameters: list[Any], named: Any, clip: Callable[[], None], seconds: float, limit: dict[str, float]
) -> Iterator[Figure]:
    num_elements = sum(p.numel() for p in parameters)
    adamw = torch.optim.AdamW(parameters, lr=RATE, fused=True)

    def baseline() -> None:
        clip()
        adamw.step()

    def gso(**options: Any) -> gs.GSO:
        return gs.GSO(named, lr=RATE, **options)

    for moment, bar, arrays in (("element", 0.60, 7), ("bin", 0.45, 5)):
        optimizer = gso(second_moment=moment)
        pair = in_turn(optimizer.step, baseline, seconds=seconds)
        # The kind of traffic it is: an update writes where it has read, like "scale".
        at_limit = 4 * arrays * num_elements / limit["scale"]
        name = f"GSO, default budget, second moment per {moment} / clip + fused AdamW"
        yield _figure(name, layout, pair, bar, at_limit)
        taken = pair.to_dict()["ours_median"]
        detail = {
            "bytes": 4 * arrays * num_elements,
            "bytes_a_second": limit,
            "seconds": taken,
            "limit_seconds": at_limit,
        }
        detail["times_the_limit_at"] = {k: taken * rate / (4 * arrays * num_elements) for k, rate in limit.items()}
        name = f"GSO per {moment} / its bytes at the bandwidth of scaling in place"
        yield Figure(name, layout, taken / at_limit, 1.15 if moment == "element" else None, "times the limit", detail)
        del optimizer
    optimizer = gso(budget={"bin": gs.Ema(1.5), "root": gs.Fixed(1e9)})
    pair = in_turn(optimizer.step, baseline, seconds=seconds)
    both = 4 * num_elements / limit["read"] + 4 * 7 * num_elements / limit["scale"]
    name = "GSO per element, Ema and a root limit (two passes) / clip + fused AdamW"
    yield _figure(name, layout, pair, 0.68, both)
