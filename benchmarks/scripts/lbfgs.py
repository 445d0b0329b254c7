"""A small network fitted to a curve by LBFGS, several calls of the closure per step."""

import torch
from torch import nn

from benchmarks.scripts.planted import Planted

planted = Planted(steps=40)
width = planted.width(16)
model = nn.Sequential(
    nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
    nn.Linear(width, 1),
)  # fmt: skip
optimizer = torch.optim.LBFGS(model.parameters(), planted.rate(0.1), max_iter=4, history_size=5)
planted.into(optimizer, model=model)
points = 2 * torch.rand(96, 2) - 1

for _ in range(planted.steps):
    planted.begin()
    x = planted.batch(points)
    y = torch.sin(3 * points[:, :1]) * points[:, 1:]

    def closure(x=x, y=y):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    planted.note(optimizer.step(closure))
planted.tell()
