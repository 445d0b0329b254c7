"""How large the heads' signals at the fork are where nothing is bounded: healthy and exploding detectors, AdamW."""

from __future__ import annotations

import argparse

import torch

from benchmarks.chain.healthy_heads import VARIANTS, train
from benchmarks.chain.record import save
from gradsplit.chain import ChainSplitter


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py fork-signals")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=0.003)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for variant in (*VARIANTS, "exploding boxes"):
        norms: list[dict[str, float]] = []

        def look(step: int, chain: ChainSplitter, norms: list[dict[str, float]] = norms) -> None:
            norms.append({row.name.split(">")[-1]: row.norm for row in chain.rows() if row.role == "task"})

        train(variant, "forks measured", 0, options.steps, options.rate, look)
        for step in (0, options.steps // 3, options.steps - 1):
            tens = norms[step : step + 10] if step == 0 else norms[step - 9 : step + 1]
            mean = {name: sum(at[name] for at in tens) / len(tens) for name in tens[0]}
            rows.append({"variant": variant, "step": step, "norms": mean})
            print(rows[-1], flush=True)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py fork-signals --steps {options.steps} --rate {options.rate}"
    )
    print(save("chain_fork_signals", command, {"options": vars(options), "rows": rows}))
