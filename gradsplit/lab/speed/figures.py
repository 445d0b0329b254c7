"""The figures: each a ratio of two programs that ran in turn, beside the bar it is held to."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import gradsplit as gs

from .pairs import Pair, in_turn

__all__ = ["bandwidth", "LAYOUTS", "parameters_of", "Figure", "step_figures"]


def bandwidth(num_elements: int, *, rounds: int = 7) -> dict[str, float]:
    """Return bytes a second, medians over rounds taken in turn; every array read or written counts once.

    "copy" and "triad" (a = b + s c) write to an array they did not read, which costs most processors a hidden read;
    "scale" (a = s a) writes where it read, as an optimizer does.
    """
    a, b, c = (torch.ones(num_elements) for _ in range(3))
    programs: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (1, b.sum),
        "copy": (2, lambda: a.copy_(b)),
        "triad": (3, lambda: torch.add(b, c, alpha=0.5, out=a)),
        "scale": (2, lambda: b.mul_(1.0)),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, (_, program) in programs.items():
            start = time.perf_counter()
            program()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: 4 * num_elements * arrays / statistics.median(times[name]) for name, (arrays, _) in programs.items()}


Shapes = dict[str, tuple[int, ...]]


def gpt(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """A GPT with tied embeddings."""
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(layers):
        for name, rows, cols in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.up", 4 * width, width),
            ("mlp.down", width, 4 * width),
        ):
            shapes[f"h.{i}.{name}.weight"] = (rows, cols)
            shapes[f"h.{i}.{name}.bias"] = (rows,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (width,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (width,)
    return shapes


def resnet50() -> Shapes:
    """ResNet-50: bottlenecks of 3, 4, 6 and 3."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            convolutions = [
                ("1", (width, channels, 1, 1)),
                ("2", (width, width, 3, 3)),
                ("3", (4 * width, width, 1, 1)),
            ]
            if block == 0:
                convolutions.append(("0", (4 * width, channels, 1, 1)))
            for name, shape in convolutions:
                place = f"layer{stage}.{block}"
                shapes[f"{place}.conv{name}.weight"] = shape
                shapes[f"{place}.bn{name}.weight"] = shapes[f"{place}.bn{name}.bias"] = (shape[0],)
            channels = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


LAYOUTS: dict[str, Callable[[], Shapes]] = {
    "gpt-23m": lambda: gpt(6, 384, 32_000, 512),
    "gpt-124m": lambda: gpt(12, 768, 50_257, 1_024),
    "resnet-50": resnet50,
    "small-tensors": lambda: {f"p{i}": (4_096,) for i in range(1_600)},
    "small-matrices": lambda: {f"p{i}": (64, 64) for i in range(1_600)},
}
"""Name -> the shapes of its tensors."""


def parameters_of(shapes: Shapes) -> tuple[list[tuple[str, Parameter]], list[Tensor]]:
    """Return named parameters with gradients, and a second copy of the gradients to fill them from."""
    generator = torch.Generator().manual_seed(0)
    pairs, sources = [], []
    for name, shape in shapes.items():
        parameter = Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * 1e-4
        pairs.append((name, parameter))
        sources.append(parameter.grad.clone())
    return pairs, sources


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


def _figure(name: str, layout: str, pair: Pair, bar: float | None, **more: Any) -> Figure:
    return Figure(name, layout, pair.ratio, bar, detail={**pair.to_dict(), **more})


Traffic = Sequence[tuple[Callable[[], object], float]]
"""Programs that move bytes, each with the multiple of its bytes that a step moves; see `in_turn`."""


def step_figures(layout: str, seconds: float) -> Iterator[Figure]:
    """Yield the figures of one layout, ``seconds`` each."""
    named, sources = parameters_of(LAYOUTS[layout]())
    parameters = [p for _, p in named]
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    small = layout.startswith("small")
    num_elements = sum(p.numel() for p in parameters)
    rates = bandwidth(num_elements)
    one, other = torch.ones(num_elements), torch.ones(num_elements)  # two, or the second would find a part in cache

    def read() -> None:
        one.sum()

    def scale() -> None:
        other.mul_(1.0)

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e9, foreach=True)

    def refill() -> None:
        torch._foreach_copy_(gradients, sources)

    def splitter(budget: Any, plan: Any = "xsp", **more: Any) -> Callable[[], object]:
        return gs.GradientSplitter(named, plan=plan, budget=budget, **more).step

    idle = splitter(gs.Fixed(1e9))
    pair = in_turn(idle, clip, memory=[(read, 1)], seconds=seconds)
    name = "GradientSplitter, rows, nothing over its limit / clip_grad_norm_(foreach)"
    yield _figure(name, layout, pair, 0.70 if small else 0.35, bins=gs.xsp(gs.layout_of(named)).num_bins)
    if small:
        return
    sgd = torch.optim.SGD(parameters, lr=RATE, momentum=0.9)
    stepping = splitter(gs.RelativeStep(1e6), optimizer=sgd)
    pair = in_turn(stepping, clip, memory=[(read, 2)], seconds=seconds / 2)
    yield _figure("the same with RelativeStep, which reads the weights too", layout, pair, None)
    pair = in_turn(splitter(gs.Fixed(1e-9)), clip, before=refill, memory=[(scale, 1)], seconds=seconds)
    yield _figure("GradientSplitter, rows, every bin over its limit / clip_grad_norm_(foreach)", layout, pair, 0.85)
    refill()
    yield from _other_plans(layout, named, idle, seconds / 2, [(read, 1)])
    yield from _updates(layout, parameters, named, clip, seconds, rates, (read, scale))


def _other_plans(
    layout: str, named: Any, idle: Callable[[], object], seconds: float, traffic: Traffic
) -> Iterator[Figure]:
    shapes = gs.layout_of(named)
    columns, boxes = gs.xsp(shapes, parts=256, axis=1), _boxes(shapes)
    plans = {"column bins, 256 a tensor": columns, "L-BF-like boxes, 16 x 16 a tensor": boxes}
    for name, plan in plans.items():
        step = gs.GradientSplitter(named, plan=plan, budget=gs.Fixed(1e9)).step
        pair = in_turn(step, idle, memory=traffic, seconds=seconds)
        yield _figure(f"{name} / row bins", layout, pair, 1.5, bins=plan.num_bins)


def _boxes(shapes: gs.Layout) -> gs.Plan:
    """Boxes of 16 x 16 cuts a tensor, what L-BF makes of evenly spread energy, without measuring one."""
    import numpy as np

    from ...plan.boxes import Boxes

    columns: list[list[int]] = []
    for t, (rows, cols) in enumerate(zip(shapes.rows, shapes.cols, strict=True)):
        down, across = (np.unique(np.linspace(0, n, min(n, 16) + 1).astype(int)).tolist() for n in (rows, cols))
        for r0, r1 in itertools.pairwise(down):
            for c0, c1 in itertools.pairwise(across):
                columns.append([t, r0, r1, c0, c1, len(columns)])
    return gs.Plan(shapes, Boxes.from_columns(*np.array(columns).T))


def _updates(
    layout: str,
    parameters: list[Any],
    named: Any,
    clip: Callable[[], None],
    seconds: float,
    rates: dict[str, float],
    read_scale: tuple[Callable[[], None], Callable[[], None]],
) -> Iterator[Figure]:
    num_elements = sum(p.numel() for p in parameters)
    adamw = torch.optim.AdamW(parameters, lr=RATE, fused=True)
    read, scale = read_scale

    def baseline() -> None:
        clip()
        adamw.step()

    def gso(**options: Any) -> gs.GSO:
        return gs.GSO(named, lr=RATE, **options, direction="adam")

    for moment, bar, arrays in (("element", 0.60, 7), ("bin", 0.45, 5)):
        optimizer = gso(second_moment=moment)
        # The kind of traffic it is: an update writes where it has read, as scaling two arrays does.
        pair = in_turn(optimizer.step, baseline, memory=[(scale, arrays / 2)], seconds=seconds)
        name = f"GSO, default budget, second moment per {moment} / clip + fused AdamW"
        yield _figure(name, layout, pair, bar)
        known, num_bytes = pair.to_dict(), 4 * arrays * num_elements
        detail = {"bytes": num_bytes, "bytes_a_second": rates, "seconds": known["ours_median"]}
        detail |= {"limit_seconds": known["limit_seconds"], "turns": known["turns"]}
        name = f"GSO per {moment} / its bytes at the bandwidth of scaling in place"
        most = 1.15 if moment == "element" else None
        yield Figure(name, layout, pair.times_the_memory, most, "times the limit", detail)
        del optimizer
    optimizer = gso(budget={"bin": gs.Ema(1.5), "root": gs.Fixed(1e9)})
    pair = in_turn(optimizer.step, baseline, memory=[(read, 1), (scale, 3.5)], seconds=seconds)
    name = "GSO per element, Ema and a root limit (two passes) / clip + fused AdamW"
    yield _figure(name, layout, pair, 0.68)
