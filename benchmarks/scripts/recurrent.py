"""A two-layer LSTM that predicts the next value of noisy waves, with clip_grad_norm_."""

import torch
from torch import nn

from benchmarks.scripts.planted import Planted

planted = Planted(steps=80)
width = planted.width(32)


class Forecast(nn.Module):
    """A recurrent network between two linear maps."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(2, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.decode = nn.Linear(width, 2)

    def forward(self, x):
        """The forward pass."""
        states, _ = self.lstm(torch.relu(self.encode(x)))
        return self.decode(self.norm(states))


model = Forecast()
optimizer = torch.optim.Adam(model.parameters(), planted.rate(3e-3))
planted.into(optimizer, model=model)

for _ in range(planted.steps):
    planted.begin()
    phase, speed = torch.rand(16, 1, 2) * 6.28, 0.2 + 0.3 * torch.rand(16, 1, 2)
    wave = torch.sin(phase + speed * torch.arange(25)[None, :, None]) + 0.05 * torch.randn(16, 25, 2)
    loss = (model(planted.batch(wave[:, :-1])) - wave[:, 1:]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    planted.note(loss)
planted.tell()
