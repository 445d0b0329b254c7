"""A compiled residual regression network under AdamW with a one-cycle rate."""

import torch
from torch import nn

from benchmarks.scripts.planted import Planted

torch._dynamo.config.skip_nnmodule_hook_guards = False  # or a hook on one layer is left out of the compiled code
planted = Planted(steps=80)
width = planted.width(32)


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        """The forward pass."""
        return x + 0.5 * self.outer(torch.tanh(self.inner(x)))


model = nn.Sequential(nn.Linear(6, width), Layer(), Layer(), Layer(), nn.Linear(width, 1))
optimizer = torch.optim.AdamW(model.parameters(), planted.rate(3e-3))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, planted.rate(3e-3), planted.steps + 1)
planted.into(optimizer, model=model)
compiled = torch.compile(model)

for _ in range(planted.steps):
    planted.begin()
    x = torch.randn(32, 6)
    y = torch.sin(x[:, :1]) + x[:, 1:2] - 0.5 * x[:, 2:3]
    loss = (compiled(planted.batch(x)) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if planted.asked.fault == "rate" and planted.now >= planted.asked.at:
        planted.raise_rates()  # the schedule has just set them back
    planted.note(loss)
planted.tell()
