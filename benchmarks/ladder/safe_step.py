"""Is the loss that the series predicts the true one? Random models, batches and bins.

A draw: one of seven families with random sizes and a random gain of its initialisation, trained for 0 to 40 steps, a
random batch, a random bin (row) of its XSP plan, d = minus the gradient on that bin. At half the radius (of radius and
kink the smaller; at the safe step where both are infinite) the predicted loss is compared with the true one; at the
safe step the true loss is compared with the one it started from.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradsplit as gs
from benchmarks.ladder.raw import save
from gradsplit.ladder import loss_of_model, taylor_ladder

Draw = tuple[nn.Module, Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor], tuple[Tensor, Tensor]]
TOLERANCE = 0.01


def _size(*choices: int) -> int:
    return choices[int(torch.randint(len(choices), ()))]


def _perceptron(activation: type[nn.Module]) -> Draw:
    width, inputs, classes = _size(8, 16, 32), _size(4, 8), _size(2, 5)
    layers: list[nn.Module] = [nn.Linear(inputs, width), activation()]
    for _ in range(_size(0, 1, 2)):
        layers += [nn.Linear(width, width), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    batch = torch.randn(_size(8, 32), inputs), torch.randint(classes, (8,))
    if batch[0].shape[0] != 8:
        batch = batch[0], torch.randint(classes, (batch[0].shape[0],))
    return model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch


def _regression() -> Draw:
    width = _size(8, 16)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
    return model, lambda m, b: F.mse_loss(m(b[0]), b[1]), (torch.randn(16, 4), torch.randn(16, 2))


def _convolutions(activation: type[nn.Module], pool: type[nn.Module]) -> Draw:
    channels = _size(3, 6)
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), activation(), pool(2),
        nn.Conv2d(channels, 2 * channels, 3), activation(), nn.Flatten(), nn.Linear(8 * channels, 4),
    )  # fmt: skip
    return model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (torch.randn(6, 1, 8, 8), torch.randint(4, (6,)))


class _Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def _recurrent() -> Draw:
    model = _Recurrent(_size(6, 12))
    return model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (torch.randn(6, 8, 3), torch.randint(3, (6,)))


class _Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.block = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))).flatten(0, 1)


def _transformer() -> Draw:
    tokens = torch.randint(9, (4, 8))
    return (
        _Transformer(_size(8, 16)),
        lambda m, b: F.cross_entropy(m(b[0]), b[1].flatten()),
        (tokens, tokens.roll(-1, 1)),
    )


FAMILIES: dict[str, Callable[[], Draw]] = {
    "tanh MLP, cross-entropy": lambda: _perceptron(nn.Tanh),
    "tanh MLP, mean square": _regression,
    "LSTM": _recurrent,
    "convolutions, GELU, mean pool": lambda: _convolutions(nn.GELU, nn.AvgPool2d),
    "transformer block": _transformer,
    "ReLU MLP": lambda: _perceptron(nn.ReLU),
    "convolutions, ReLU, max pool": lambda: _convolutions(nn.ReLU, nn.MaxPool2d),
}
PIECEWISE = ("ReLU MLP", "convolutions, ReLU, max pool")


def draw(seed: int, family: str) -> Draw:
    """A random model of the family, its loss and a batch, float64."""
    torch.manual_seed(seed)
    model, loss_fn, batch = FAMILIES[family]()
    gain = float(torch.empty(()).uniform_(0.5, 2.0))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(gain)
    model = model.double()
    batch = (
        (batch[0].double() if batch[0].is_floating_point() else batch[0]),
        (batch[1].double() if batch[1].is_floating_point() else batch[1]),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(int(torch.randint(41, ()))):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return model, loss_fn, batch


def measure(seed: int, family: str, order: int) -> dict:
    """One draw: what the series says at half its radius and at the safe step, and what is true there."""
    model, loss_fn, batch = draw(seed, family)
    plan = gs.xsp(gs.layout_of(model))
    loss_of_params, params = loss_of_model(model, loss_fn, batch)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradient = dict(zip(leaves, torch.autograd.grad(loss_of_params(leaves), list(leaves.values())), strict=True))
    bin_ = plan.bins[int(torch.randint(plan.num_bins, ()))]
    direction = {}
    for box in bin_.boxes:
        rows, columns = slice(box.start[0], box.stop[0]), slice(box.start[1], box.stop[1])
        g = gradient[box.tensor]
        view = g.reshape(1, -1) if g.ndim < 2 else g.flatten(1)
        move = torch.zeros_like(view)
        move[rows, columns] = -view[rows, columns]
        direction[box.tensor] = move.reshape(g.shape)
    ladder = taylor_ladder(loss_of_params, params, direction, order=order)

    def true(step: float) -> float:
        moved = {name: p + step * direction[name] if name in direction else p for name, p in params.items()}
        return float(loss_of_params(moved))

    radius, kink, safe = float(ladder.radius_B[0]), float(ladder.kink_B[0]), float(ladder.safe_step_B[0])
    reach = min(radius, kink)
    step = 0.5 * reach if math.isfinite(reach) else safe
    step = step if math.isfinite(step) else 1.0
    predicted, at_step = float(ladder.predict(step)[0]), true(step)
    at_safe = true(safe) if math.isfinite(safe) else ladder.loss
    return {
        "seed": seed,
        "family": family,
        "bin": bin_.name,
        "loss": ladder.loss,
        "length": float(ladder.length_B[0]),
        "radius": radius if math.isfinite(radius) else "inf",
        "kink": kink if math.isfinite(kink) else "inf",
        "spread": ladder.radii[0].spread if math.isfinite(ladder.radii[0].spread) else "inf",
        "step": step,
        "predicted": predicted,
        "true": at_step,
        "error": abs(predicted - at_step) / abs(at_step),
        "safe_step": safe if math.isfinite(safe) else "inf",
        "limited_by": ladder.limited_by[0],
        "true_at_safe_step": at_safe,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--order", type=int, default=30)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = list(FAMILIES)
    jobs = [(seed, names[seed % len(names)], options.order) for seed in range(options.draws)]
    if options.workers > 1:
        with multiprocessing.get_context("spawn").Pool(options.workers, torch.set_num_threads, (1,)) as pool:
            rows = pool.starmap(measure, jobs, chunksize=1)
    else:
        rows = [measure(*job) for job in jobs]
    table = [summary(name, [r for r in rows if r["family"] == name]) for name in names]
    smooth = [r for r in rows if r["family"] not in PIECEWISE]
    table += [summary("all smooth", smooth), summary("all", rows)]
    for row in table:
        print(
            f"{row['family']:32s} n {row['n']:3d}   within 1 %: {100 * row['within']:5.1f} %   median error "
            f"{row['median_error']:.1e}   safe step keeps its word: {100 * row['safe']:5.1f} %"
        )
    print(save(f"safe-step-order-{options.order}", {"order": options.order, "table": table, "draws": rows}))


def summary(family: str, rows: list[dict]) -> dict:
    """Share of draws within the tolerance, and share whose true loss at the safe step is not above the start's."""
    return {
        "family": family,
        "n": len(rows),
        "within": sum(r["error"] <= TOLERANCE for r in rows) / len(rows),
        "median_error": statistics.median(r["error"] for r in rows),
        "worst_error": max(r["error"] for r in rows),
        "safe": sum(r["true_at_safe_step"] <= r["loss"] * (1 + 1e-6) for r in rows) / len(rows),
    }
