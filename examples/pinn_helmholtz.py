"""A network solves u'' + u = f on (-1, 1), u(-1) = u(1) = 0: two loss terms of very different size, no weight tuned.

    python examples/pinn_helmholtz.py --plot helmholtz.html

The equation's term has a gradient a thousand times that of the boundary's. Added as they are, the boundary is never
learned. `TermSplitter.backward` bounds both by the smaller one. The plot needs plotly.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import gradsplit as gs


def terms_of(net: nn.Module) -> dict[str, Tensor]:
    """The two terms on 128 random points, for the solution u = sin(2 pi x)."""
    x = (torch.rand(128, 1) * 2 - 1).requires_grad_()
    u = net(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    curve = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
    f = (1 - (2 * math.pi) ** 2) * torch.sin(2 * math.pi * x.detach())
    return {
        "equation": (curve + u - f).square().mean(),
        "boundary": net(torch.tensor([[-1.0], [1.0]])).square().mean(),
    }


def train(steps: int, *, split: bool, seed: int = 0) -> nn.Module:
    """Adam with a falling rate; the sum of the terms, or the terms split."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    splitter = gs.TermSplitter(net)
    for _ in range(steps):
        optimizer.zero_grad()
        terms = terms_of(net)
        if split:
            splitter.backward(**terms)
        else:
            sum(terms.values()).backward()
        optimizer.step()
        schedule.step()
    if split:
        for row in splitter.rows():
            print(f"  last step: {row.term:8}  norm {row.norm:.3g}  times {row.scale:.3g}")
    return net


def main() -> None:
    """Train both ways, print the errors, and draw the solutions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    x = torch.linspace(-1, 1, 201).view(-1, 1)
    exact = torch.sin(2 * math.pi * x)
    curves = {"exact": exact}
    for name, split in (("sum of the terms", False), ("terms split", True)):
        u = train(asked.steps, split=split)(x).detach()
        curves[name] = u
        print(f"{name}: relative error {float((u - exact).norm() / exact.norm()):.3g}")
    if asked.plot:
        import plotly.graph_objects as go

        lines = [go.Scatter(x=x[:, 0].tolist(), y=u[:, 0].tolist(), name=name) for name, u in curves.items()]
        go.Figure(lines).write_html(asked.plot)


if __name__ == "__main__":
    main()
