"""A small convolutional classifier under SGD with momentum; four micro-batches make a step, and the rate decays."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.scripts.planted import Planted

planted = Planted(steps=70)
width = planted.width(8)
model = nn.Sequential(
    nn.Conv2d(3, width, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(width, 2 * width, 3, 2, 1),
    nn.GroupNorm(2, 2 * width),
    nn.ReLU(),
    nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(2 * width * 9, 32),
    nn.ReLU(),
    nn.Linear(32, 4),
)
optimizer = torch.optim.SGD(model.parameters(), planted.rate(0.02), momentum=0.9, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, planted.steps)
planted.into(optimizer, model=model)


def batch(count):
    """Stripes in four directions."""
    label = torch.randint(0, 4, (count,))
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    ways = torch.stack([row, column, row + column, row - column])
    x = torch.sin(1.2 * ways[label] + torch.rand(count, 1, 1) * 6.28)[:, None].expand(-1, 3, -1, -1)
    return x + 0.3 * torch.randn(count, 3, 12, 12), label


for _ in range(planted.steps):
    planted.begin()
    optimizer.zero_grad()
    whole = 0.0
    for micro in range(4):
        x, label = batch(8)
        loss = F.cross_entropy(model(planted.batch(x) if micro == 2 else x), label) / 4
        loss.backward()
        whole += float(loss.detach())
    optimizer.step()
    if planted.asked.fault == "rate" and planted.now == planted.asked.at:
        schedule.base_lrs = [30 * rate for rate in schedule.base_lrs]
    schedule.step()
    planted.note(whole)
planted.tell()
