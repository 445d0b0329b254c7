"""A GAN on images of 16 x 16: two networks, two optimizers, alternating steps."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.scripts.planted import Planted

planted = Planted(steps=70)
width = planted.width(16)


class Generator(nn.Module):
    """Noise to images."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(8, 2 * width, 4, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z):
        """The forward pass."""
        return self.main(z)


class Critic(nn.Module):
    """Images to a score."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4),
        )

    def forward(self, x):
        """The forward pass."""
        return self.main(x).flatten()


def images(count):
    """Bright squares at random places."""
    x = -torch.ones(count, 1, 16, 16)
    for i, (row, column) in enumerate(torch.randint(2, 9, (count, 2)).tolist()):
        x[i, 0, row : row + 5, column : column + 5] = 1.0
    return x + 0.05 * torch.randn_like(x)


generator, critic = Generator(), Critic()
of_generator = torch.optim.Adam(generator.parameters(), planted.rate(1e-3), betas=(0.5, 0.999))
of_critic = torch.optim.Adam(critic.parameters(), planted.rate(1e-3), betas=(0.5, 0.999))
planted.into([of_generator, of_critic], Generator=generator, Critic=critic)

for _ in range(planted.steps):
    planted.begin()
    real = planted.batch(images(16))
    of_critic.zero_grad()
    fake = generator(torch.randn(16, 8, 1, 1))
    loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
    loss.backward()
    of_critic.step()
    of_generator.zero_grad()
    F.softplus(-critic(fake)).mean().backward()
    of_generator.step()
    planted.note(loss)
planted.tell()
