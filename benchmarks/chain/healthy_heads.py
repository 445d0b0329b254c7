"""Does the fork rule harm heads that are as they should be? Four healthy variants of the detector, AdamW."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.chain.detector import WeightedBoxes, make_optimizer
from benchmarks.chain.record import middle, save
from gradsplit.chain import ChainSplitter
from gradsplit.workloads.detection import build_detection

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


def train(variant: str, ruled: bool, seed: int, steps: int, rate: float) -> float:
    """Score of one run."""
    task = build_detection(seed, healthy=True)
    torch.manual_seed(seed)
    model = ThirdHead(task.model) if variant == "three heads" else task.model
    optimizer = make_optimizer("adamw", model.parameters(), rate)
    chain = ChainSplitter(model, at="forks").attach(optimizer) if ruled else None
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
        loss.backward()
        optimizer.step()
    if chain is not None:
        chain.remove()
    return task.evaluate(task.model)["class_accuracy" if "head of" in variant or "finished" in variant else "score"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py healthy-heads")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rate", type=float, default=0.003)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for variant in VARIANTS:
        for seed in range(options.seeds):
            plain, ruled = (train(variant, r, seed, options.steps, options.rate) for r in (False, True))
            rows.append({"variant": variant, "seed": seed, "none": plain, "fork rule + module limits": ruled})
            print(rows[-1], flush=True)
        mine = [row for row in rows if row["variant"] == variant]
        a, b = middle(r["none"] for r in mine), middle(r["fork rule + module limits"] for r in mine)
        print(f"{variant}: medians {a:.3f} and {b:.3f}, change {b / a - 1:+.1%}", flush=True)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py healthy-heads --steps {options.steps} "
        f"--seeds {options.seeds} --rate {options.rate}"
    )
    print(save("chain_healthy_heads", command, {"options": vars(options), "rows": rows}))
