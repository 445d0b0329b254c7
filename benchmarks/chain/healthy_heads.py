"""Do the fork rule, its parts and the guard harm heads that are as they should be? Four detectors, AdamW."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from shlex import quote as quoted
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.chain.detector import WeightedBoxes, make_optimizer
from benchmarks.chain.record import Rows
from gradsplit.chain import ChainSplitter, forks
from gradsplit.chain.chain_splitter import ModuleLimits, modules_with_parameters
from gradsplit.chain.forks import fork_limit
from gradsplit.lab.workloads.detection import build_detection

# what is bounded: (where ChainSplitter bounds signals, whether modules are bounded, times the smallest branch)
METHODS: dict[str, tuple[str | None, bool, float]] = {
    "none": (None, False, 1.0),
    "fork rule + module limits": ("forks", True, 1.0),
    "fork rule alone": ("forks", False, 1.0),
    "module limits alone": (None, True, 1.0),
    "fork rule at 10 x + module limits": ("forks", True, 10.0),
    "default": ("auto", True, 1.0),
    "forks measured": ("forks", False, math.inf),
}
VARIANTS = ("balanced heads", "three heads", "a finished head", "a head of weight .01")


class ThirdHead(nn.Module):
    """A detector with a head that says which cells own an object."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.owned_head = nn.Conv2d(detector.box_head.in_channels, 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw boxes, logits of the classes, logits of ownership."""
        d = self.detector
        h = d.trunk(images)
        raw = d.box_head(d.box_tower(h)).permute(0, 2, 3, 1)
        return raw, d.class_head(d.class_tower(h)).permute(0, 2, 3, 1), self.owned_head(h)[:, 0]


def train(
    variant: str,
    method: str,
    seed: int,
    steps: int,
    rate: float,
    look: Callable[[int, ChainSplitter], None] | None = None,
) -> float:
    """Score of one run; of the class head alone where the box head is finished or hardly counts.

    Args:
        variant: one of VARIANTS, or "exploding boxes", the detector as it comes.
        method: a key of METHODS.
        seed: of weights and batches.
        steps: of the optimizer, AdamW.
        rate: the learning rate.
        look: called after every step with its number and the splitter, if there is one.
    """
    task = build_detection(seed, healthy=variant in VARIANTS)
    torch.manual_seed(seed)
    model = ThirdHead(task.model) if variant == "three heads" else task.model
    optimizer = make_optimizer("adamw", model.parameters(), rate)
    at, modules, slack = METHODS[method]
    chain = None
    if at:
        chain = ChainSplitter(model, at=at, parameters="modules" if modules else None).attach(optimizer)
    limits = ModuleLimits(modules_with_parameters(model))
    step = 0

    def weight() -> float:
        if variant == "a finished head":
            return 1.0 if step < steps // 4 else 0.0
        return 0.01 if variant == "a head of weight .01" else 1.0

    class Two(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            raw, logits, owned = model(images)
            self.owned = owned
            return raw, logits

    two = Two() if variant == "three heads" else model
    weighted = WeightedBoxes(two, weight)
    for step in range(steps):
        batch = task.batch(step)
        optimizer.zero_grad()
        loss = task.loss(weighted, batch)
        if variant == "three heads":
            loss = loss + F.binary_cross_entropy_with_logits(two.owned, (batch[2] != task.num_classes).float())
        with patch.object(forks, "fork_limit", lambda maximum_K: slack * fork_limit(maximum_K)):
            loss.backward()
        if modules and at is None:
            limits.bound_()
        optimizer.step()
        if look is not None and chain is not None:
            look(step, chain)
    if chain is not None:
        chain.remove()
    return task.evaluate(task.model)["class_accuracy" if "head of" in variant or "finished" in variant else "score"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py healthy-heads")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[name for name in METHODS if name != "forks measured"]
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py healthy-heads {' '.join(map(quoted, arguments))}"
    rows = Rows("chain_healthy_heads", command, ("variant", "method", "steps", "rate", "seed"))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for variant, method in itertools.product(VARIANTS, options.methods):
            if rows.missing(variant, method, options.steps, options.rate, seed):
                score = train(variant, method, seed, options.steps, options.rate)
                rows.add({"variant": variant, "method": method, "steps": options.steps, "rate": options.rate,
                          "seed": seed, "score": score})  # fmt: skip
    print(rows.write())
