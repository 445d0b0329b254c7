"""Digits with BatchNorm, and 2 % of the images blank: the model standardises each image, so a blank one is 0 / 0.

    python examples/digits_blank_images.py

No check of the data sees it, since a blank image is finite. The NaN is born in the model, reaches the running
statistics of BatchNorm, and the run is lost. `SampleSplitter` puts such a row in quarantine and names it.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradsplit as gs


class Net(nn.Module):
    """Two convolutions with BatchNorm behind a standardisation per image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of 8 x 8 images."""
        flat = x.flatten(1)
        return self.body(
            (x - flat.mean(1).view(-1, 1, 1, 1)) / flat.std(1, correction=0).view(-1, 1, 1, 1),
        )


def train(steps: int, *, split: bool, seed: int = 0) -> float:
    """The accuracy on clean images."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    x[:1200][torch.rand(1200) < 0.02] = 0.5
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    splitter = gs.SampleSplitter(net)
    if split:
        splitter.attach(optimizer)
    stood_out = set()
    for _ in range(steps):
        rows = torch.randint(1200, (64,))
        optimizer.zero_grad()
        each = nn.functional.cross_entropy(net(x[rows]), y[rows], reduction="none")
        if splitter.kept_S is not None:
            each = each[splitter.kept_S]  # for the number that is printed; the gradient leaves these rows out by itself
        each.mean().backward()
        optimizer.step()
        stood_out |= {int(rows[one.sample]) for one in splitter.named(last=True) if one.ratio == "not finite"}
    splitter.remove()
    if split:
        blank = {row for row in range(1200) if float(x[row].std()) == 0}
        print(f"  {len(stood_out)} images were named, {len(stood_out & blank)} of them blank; {len(blank)} are")
    net.eval()
    with torch.no_grad():
        return float((net(x[1200:]).argmax(1) == y[1200:]).float().mean())


def main() -> None:
    """Train both ways and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    asked = parser.parse_args()
    for name, split in (("ordinary gradient", False), ("split by sample", True)):
        print(f"{name}: accuracy {train(asked.steps, split=split):.3f}")


if __name__ == "__main__":
    main()
