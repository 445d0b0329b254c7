"""A regression whose data has bad rows: in 5 % of them one sensor is thirty times too large.

    python examples/regression_bad_rows.py

`SampleSplitter` bounds what one row adds to the gradient, and names the rows that stood out. A loss that is robust in y
does not see them, since their y is right.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

import torch
from torch import Tensor, nn

import gradsplit as gs


def friedman(size: int) -> tuple[Tensor, Tensor]:
    """Friedman's function of ten uniform numbers, both standardised."""
    x = torch.rand(size, 10)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return (x - 0.5) * 12**0.5, (y - 14.4) / 4.9


def train(steps: int, *, split: bool, seed: int = 0) -> float:
    """The error on clean rows; with the splitter also which rows of the data stood out most often."""
    torch.manual_seed(seed)
    (x, y), (test_x, test_y) = friedman(1000), friedman(2000)
    bad = torch.rand(1000) < 0.05
    x[bad] *= 30
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    splitter = gs.SampleSplitter(net, kind="regression")
    if split:
        splitter.attach(optimizer)
    stood_out: Counter[int] = Counter()
    for _ in range(steps):
        rows = torch.randint(1000, (64,))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[rows])[:, 0], y[rows]).backward()
        optimizer.step()
        schedule.step()
        if split:
            stood_out.update({int(rows[one.sample]) for one in splitter.named(beyond=3.0, last=True)})
    splitter.remove()
    if split:
        most = [row for row, _ in stood_out.most_common(int(bad.sum()))]
        right = sum(bool(bad[row]) for row in most)
        print(f"  of the {len(most)} rows that stood out most often, {right} are bad; there are {int(bad.sum())}")
    with torch.no_grad():
        return float((net(test_x)[:, 0] - test_y).square().mean().sqrt())


def main() -> None:
    """Train both ways and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    asked = parser.parse_args()
    for name, split in (("ordinary gradient", False), ("split by sample", True)):
        print(f"{name}: RMSE on clean rows {train(asked.steps, split=split):.3f}")


if __name__ == "__main__":
    main()
