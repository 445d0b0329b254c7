"""What samples and terms cost a step: processor time with the splitter over that without, step by step in turn.

Run: python benchmarks/sources_cost.py      writes benchmarks/results/sources/cost.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradsplit as gs
from benchmarks import sources


def _pairs(plain: Callable[[], float], split: Callable[[], float], rounds: int) -> list[float]:
    """Processor time of a step with the splitter over one without; they alternate, and so does which comes first."""
    found = []
    for turn in range(rounds + 20):
        if turn % 2:
            numerator, denominator = split(), plain()
        else:
            denominator, numerator = plain(), split()
        found.append(numerator / denominator)
    return found[20:]


def _seconds(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def cost(rounds: int = 100) -> dict[str, list[float]]:
    """Processor time of a step with the splitter over one without, per step."""
    torch.manual_seed(0)
    made: dict[str, list[float]] = {}
    images, target = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    for name, norm, wide in (
        ("samples, digits", False, 1),
        ("samples, digits with BatchNorm", True, 1),
        ("samples, digits, four times the width", False, 4),
        ("samples, digits with BatchNorm, four times the width", True, 4),
    ):
        net, twin = sources.Cnn(norm=norm, wide=wide), sources.Cnn(norm=norm, wide=wide)

        def once(net: nn.Module = net) -> float:
            net.zero_grad()
            return _seconds(lambda: F.cross_entropy(net(images), target).backward())

        with gs.SampleSplitter(net):
            made[name] = _pairs(lambda twin=twin, once=once: once(twin), once, rounds)
    for name, width, points in (
        ("terms, Helmholtz on a line, width 32, 128 points", 32, 128),
        ("terms, Helmholtz on a line, width 256, 1,024 points", 256, 1024),
    ):
        net = sources._tanh_net(1, width)
        parts, generator = gs.TermSplitter(net), torch.Generator().manual_seed(0)

        def passes(net: nn.Module = net, generator: torch.Generator = generator, points: int = points) -> None:
            for term in sources.helmholtz_line(net, generator, points).values():
                term.backward(retain_graph=True)

        def bounded(
            net: nn.Module = net,
            parts: gs.TermSplitter = parts,
            generator: torch.Generator = generator,
            points: int = points,
        ) -> None:
            parts.backward(**sources.helmholtz_line(net, generator, points))

        def timed(step: Callable[[], None], net: nn.Module = net) -> float:
            net.zero_grad()
            return _seconds(step)

        made[name] = _pairs(
            lambda timed=timed, step=passes: timed(step), lambda timed=timed, step=bounded: timed(step), rounds
        )
    return {name: [round(ratio, 4) for ratio in found] for name, found in made.items()}


def main() -> None:
    """Four runs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=sources.RESULTS / "cost.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = [cost() for _ in range(4)]
    about = {
        "command": "python benchmarks/sources_cost.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 2 shared cores, torch {torch.__version__}",
        "runs": "four runs of 100 pairs, one after the other",
    }
    ratio = {step: [one for run in runs for one in run[step]] for step in runs[0]}
    asked.out.write_text(json.dumps({"about": about, "ratio": ratio}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
