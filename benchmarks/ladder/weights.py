"""Parameters, text and derivatives of the small text model, for the comparison with jax.experimental.jet."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.ladder.gpt import problem
from gradsplit.ladder import taylor_ladder


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="where to write the .npz file")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loss_of_params, params, text = problem()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradient = torch.autograd.grad(loss_of_params(leaves), list(leaves.values()))
    ladder = taylor_ladder(loss_of_params, params, order=10)
    np.savez(
        options.path,
        text=text.numpy(),
        derivatives=ladder.derivative.to_float()[:, 0],
        **{f"p.{name}": p.numpy() for name, p in params.items()},
        **{f"d.{name}": -g.numpy() for name, g in zip(leaves, gradient, strict=True)},
    )
    print(options.path)
