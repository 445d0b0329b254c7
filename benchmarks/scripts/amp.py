"""A residual network under autocast to float16 with a GradScaler that unscales before the script's own clip."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.scripts.planted import Planted

planted = Planted(steps=80)
width = planted.width(48)


class Block(nn.Module):
    """A residual block."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        """The forward pass."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """The network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(10, width)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        """The forward pass."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


model = Net()
optimizer = torch.optim.AdamW(model.parameters(), planted.rate(2e-3))
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=25)
planted.into(optimizer, model=model)
centres = 1.5 * torch.randn(5, 10)

for _ in range(planted.steps):
    planted.begin()
    label = torch.randint(0, 5, (32,))
    x = planted.batch(centres[label] + torch.randn(32, 10))
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x).float(), label)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    scaler.step(optimizer)
    scaler.update()
    planted.note(loss)
planted.tell()
