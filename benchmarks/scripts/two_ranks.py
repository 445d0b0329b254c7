"""A classifier on two ranks under DistributedDataParallel with gloo; RANK and its like come from outside."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.scripts.planted import Planted

planted = Planted(steps=70)
width = planted.width(32)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(planted.seed)


class Net(nn.Module):
    """The network."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 6)

    def forward(self, x):
        """The forward pass."""
        return self.head(self.body(x))


model = Net()
spread = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), planted.rate(0.05), momentum=0.9)
planted.into(optimizer, model=model)
centres = 1.5 * torch.randn(6, 12)
torch.manual_seed(1000 * planted.seed + rank)

for _ in range(planted.steps):
    planted.begin()
    label = torch.randint(0, 6, (16,))
    x = planted.batch(centres[label] + torch.randn(16, 12))
    loss = F.cross_entropy(spread(x), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    planted.note(loss)
planted.tell()
dist.destroy_process_group()
