"""Does the default ChainSplitter leave healthy runs alone? The project's language models and a normalised conv net."""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import nn

from benchmarks.chain.record import Rows
from gradsplit.chain import ChainSplitter
from gradsplit.lab.registry import workload
from gradsplit.lab.workloads.stacks import DigitsTask


def conv_net(seed: int) -> DigitsTask:
    """Six convolutions with batch normalisation on the digits."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth in range(6):
        layers += [nn.Conv2d(16 if depth else 1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return DigitsTask(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), seed, batch=32)


def final_loss(name: str, seed: int, steps: int, guarded: bool) -> tuple[float, int]:
    """Mean loss of the last tenth of the steps, and how often a joint was bounded."""
    task = conv_net(seed) if name == "conv" else workload(name).build(seed)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    chain = ChainSplitter(task.model).attach(optimizer) if guarded else None
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    bounded = sum(row.bounded for row in chain.rows()) if chain else 0
    if chain:
        chain.remove()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail), bounded


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py healthy-runs")
    parser.add_argument("--runs", nargs="+", default=["gpt", "lstm", "conv"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py healthy-runs --runs {' '.join(options.runs)} "
        f"--steps {options.steps} --seeds {options.seeds}"
    )
    rows = Rows("chain_healthy_runs", command, ("run", "steps", "seed"))
    for name, seed in itertools.product(options.runs, range(options.seeds)):
        if rows.missing(name, options.steps, seed):
            plain, _ = final_loss(name, seed, options.steps, guarded=False)
            guarded, bounded = final_loss(name, seed, options.steps, guarded=True)
            rows.add({"run": name, "steps": options.steps, "seed": seed, "plain": plain, "guarded": guarded,
                      "change": guarded / plain - 1, "bounded": bounded})  # fmt: skip
    print(rows.write())
