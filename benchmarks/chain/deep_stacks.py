"""The plain stack of 146 convolutions: what diagnose says of it as it was initialised, and training after balance_."""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import nn

from benchmarks.chain.record import save
from gradsplit.chain import balance_, gradient_chain
from gradsplit.diagnose import diagnose
from gradsplit.lab.workloads.stacks import build_plain_stack

SETTINGS = {
    "as initialised": None,
    "balance_": {},
    "balance_(on=.95, orthogonal)": {"on": 0.95, "orthogonal": True},
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py deep-stack")
    parser.add_argument("--depth", type=int, default=146)
    parser.add_argument("--gain", type=float, default=1.4)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        for label, how in SETTINGS.items():
            task = build_plain_stack(seed, depth=options.depth, gain=options.gain)
            model, began = task.model, time.time()
            first = diagnose(model, task.loss, task.batch(0)).findings
            if how is not None:
                balance_(model, task.loss, task.batch(0), **how)
            bottom = gradient_chain(model, task.loss, task.batch(1)).links[-1].cumulative
            optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
            losses = []
            for step in range(options.steps):
                optimizer.zero_grad()
                loss = task.loss(model, task.batch(step))
                if not math.isfinite(float(loss.detach())):
                    break
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
            rows.append(
                {
                    "setting": label,
                    "seed": seed,
                    "diagnosis": [[f.kind, f.name, f.sentence] for f in first[:2]],
                    "log10_gain_to_the_first_layer": bottom,
                    "losses": losses[:: max(1, options.steps // 24)],
                    "steps": len(losses),
                    "seconds": time.time() - began,
                    **task.evaluate(model),
                }
            )
            print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
    command = (
        f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py deep-stack --depth {options.depth} --gain {options.gain} "
        f"--steps {options.steps} --rate {options.rate} --seeds {options.seeds}"
    )
    print(save("chain_deep_stack", command, {"options": vars(options), "rows": rows}))
