"""Temporal order (Pascanu et al. 2013): SGD, global clip, clip + gain penalty, per-step bounds, with equal updates.

50 tanh units, SGD at rate 0.01, batch 20, limit 1, penalty weight 2; `smart_tanh` initialisation. Solved: less than 1 %
of 500 fresh sequences wrong, looked at every 200 updates.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.chain.record import save
from gradsplit.budget import Fixed
from gradsplit.chain import ChainSplitter, Unrolled, gain_penalty

METHODS = ("SGD", "global clip", "clip + gain penalty", "per-step bounds")
UNITS, SYMBOLS, ALPHA = 50, 6, 2.0


def sequences(length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One-hot (length, count, 6) and the class, 0 to 3, of the ordered pair of informative symbols."""
    tokens = torch.randint(2, SYMBOLS, (length, count), generator=generator)
    first = torch.randint(length // 10, 2 * length // 10, (count,), generator=generator)
    second = torch.randint(5 * length // 10, 6 * length // 10, (count,), generator=generator)
    a, b = (torch.randint(0, 2, (count,), generator=generator) for _ in range(2))
    column = torch.arange(count)
    tokens[first, column], tokens[second, column] = a, b
    return F.one_hot(tokens, SYMBOLS).float(), 2 * a + b


class Net(nn.Module):
    """An unrolled tanh recurrence and a softmax layer on its last state."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rnn = nn.RNN(SYMBOLS, UNITS)
        self.unrolled = Unrolled(self.rnn)
        self.out = nn.Linear(UNITS, 4)
        with torch.no_grad():
            for p in self.parameters():
                p.zero_() if p.dim() == 1 else p.normal_(std=0.1)
            weight = torch.zeros(UNITS, UNITS)
            for row in weight:
                row[torch.randperm(UNITS)[:15]] = 0.1 * torch.randn(15)
            radius = torch.linalg.eigvals(weight).abs().max()
            self.rnn.weight_hh_l0.copy_(weight * 0.95 / radius)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (count, 4)."""
        return self.out(self.unrolled(x)[0][-1])


def train(method: str, length: int, seed: int, updates: int, seconds: float) -> dict[str, Any]:
    """One run; ends when solved, or after so many updates, or after so long."""
    net = Net(seed)
    draw, fresh = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)
    optimizer = torch.optim.SGD([p for n, p in net.named_parameters() if "unrolled" not in n], lr=0.01)
    chain = None
    if method == "per-step bounds":
        chain = ChainSplitter(net, at=["unrolled.cells.0"], budget=Fixed(0.1), steps=True).attach()
    began, best, done, largest = time.time(), 1.0, None, 0.0
    update = 0
    for update in range(1, updates + 1):
        x, y = sequences(length, 20, draw)
        optimizer.zero_grad()
        with net.unrolled.keep_signals():
            F.cross_entropy(net(x), y).backward()
        if method == "clip + gain penalty":
            (ALPHA * gain_penalty(net.unrolled)).backward()
        if method in ("global clip", "clip + gain penalty"):
            largest = max(largest, float(nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)))
        optimizer.step()
        if update % 200 == 0:
            with torch.no_grad():
                x, y = sequences(length, 500, fresh)
                wrong = float((net(x).argmax(1) != y).double().mean())
            best = min(best, wrong)
            if wrong < 0.01:
                done = update
                break
            if time.time() - began > seconds:
                break
    if chain is not None:
        chain.remove()
    return {
        "method": method,
        "length": length,
        "seed": seed,
        "solved": done is not None,
        "updates": update,
        "best_error": best,
        "largest_norm": largest,
        "seconds": time.time() - began,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py temporal-order")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=16000)
    parser.add_argument("--seconds", type=float, default=200.0, help="most wall time a run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for length in options.lengths:
        for method in METHODS:
            for seed in range(options.seeds):
                rows.append(train(method, length, seed, options.updates, options.seconds))
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    lengths = " ".join(map(str, options.lengths))
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py temporal-order --lengths {lengths} "
        f"--seeds {options.seeds} --updates {options.updates} --seconds {options.seconds:g}"
    )
    print(save("chain_temporal_order", command, {"options": vars(options), "rows": rows}))


if __name__ == "__main__":
    main([])
