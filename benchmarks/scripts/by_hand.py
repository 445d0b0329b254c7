"""A character model without an optimizer: every weight is updated by hand."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.scripts.planted import Planted

planted = Planted(steps=80)
width = planted.width(48)
rate = planted.rate(0.1)


class Next(nn.Module):
    """Three characters to the next."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 10)
        self.hidden = nn.Linear(30, width)
        self.second = nn.Linear(width, width)
        self.out = nn.Linear(width, 20)

    def forward(self, context):
        """The forward pass."""
        x = torch.tanh(self.hidden(self.table(context).flatten(1)))
        return self.out(torch.tanh(self.second(x)))


model = Next()
planted.into([], model=model)
for _ in range(planted.steps):
    planted.begin()
    if planted.asked.fault == "rate" and planted.now == planted.asked.at:
        rate *= 30
    first, stride = torch.randint(0, 20, (48, 1)), torch.randint(1, 4, (48, 1))
    text = (first + stride * torch.arange(4)) % 20
    loss = F.cross_entropy(model(text[:, :3]), text[:, 3])
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    for parameter in model.parameters():
        parameter.data += -rate * parameter.grad
    planted.note(loss)
planted.tell()
