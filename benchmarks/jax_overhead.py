"""What bounding rows costs a compiled step in JAX, beside optax's own adaptive clip, global clip and AdamW.

Every transformation is compiled alone, on the parameters and gradients of a GPT; rounds alternate between them, so each
ratio is of neighbours in time. Kept are wall time and processor time (all threads of the process), which a busy machine
distorts less.

Run: python benchmarks/jax_overhead.py --out benchmarks/results/jax_overhead.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import gradsplit as gs
from gradsplit.integrations.optax import gso, split_gradients

SIZES = {"5 M": (256, 6, 2000), "25 M": (512, 7, 6000)}
"""Width, blocks, vocabulary."""

PAIRS: dict[str, tuple[str, str]] = {
    "rows, Relative": ("split relative", "adaptive_grad_clip"),
    "rows, RelativeStep": ("split relative_step", "adaptive_grad_clip"),
    "rows, Ema": ("split ema", "adaptive_grad_clip"),
    "rows and root": ("split rows and root", "adaptive_grad_clip"),
    "GSO": ("gso", "clip and adamw"),
    "GSO, one second moment a row": ("gso bin", "clip and adamw"),
}
"""Row of the table: ours, theirs."""


def transformations() -> dict[str, optax.GradientTransformation]:
    """What is measured, by name."""
    return {
        "adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
        "clip_by_global_norm": optax.clip_by_global_norm(1.0),
        "split relative": split_gradients("xsp", gs.Relative(0.01)),
        "split relative_step": split_gradients("xsp", learning_rate=0.1, momentum=0.9),
        "split ema": split_gradients("xsp", "ema"),
        "split rows and root": split_gradients("xsp", {"root": gs.Fixed(1.0), "bin": gs.Relative(0.01)}),
        "clip and adamw": optax.chain(optax.adaptive_grad_clip(0.01), optax.adamw(1e-3)),
        "gso": gso(1e-3, direction="adam"),
        "gso bin": gso(1e-3, direction="adam", second_moment="bin"),
    }


def gpt(width: int, blocks: int, vocabulary: int, seed: int) -> dict[str, Any]:
    """Arrays in the shapes of a GPT's parameters, kernels (in, out)."""
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jax.numpy.asarray(rng.standard_normal(shape) / width**0.5, jax.numpy.float32)

    def dense(inputs: int, outputs: int) -> dict[str, Any]:
        return {"kernel": array(inputs, outputs), "bias": array(outputs)}

    made: dict[str, Any] = {"token": {"embedding": array(vocabulary, width)}}
    for i in range(blocks):
        made[f"block_{i}"] = {
            "qkv": dense(width, 3 * width),
            "out": dense(width, width),
            "up": dense(width, 4 * width),
            "down": dense(4 * width, width),
            "norm": {"scale": array(width), "bias": array(width)},
        }
    return made


def measured(params: Any, gradients: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall and processor seconds of every transformation's compiled update, round by round."""
    ready: dict[str, Callable[[], Any]] = {}
    for name, transformation in transformations().items():
        update, state = jax.jit(transformation.update), transformation.init(params)
        _, state = jax.block_until_ready(update(gradients, state, params))
        ready[name] = lambda update=update, state=state: jax.block_until_ready(update(gradients, state, params))
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in ready}
    for _ in range(rounds):
        for name, step in ready.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            seconds[name]["wall"].append(time.perf_counter() - wall)
            seconds[name]["processor"].append(time.process_time() - processor)
    return seconds


def main() -> None:
    """Measure, print the medians of the paired ratios, keep every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    asked = parser.parse_args()
    sizes: dict[str, Any] = {}
    for size, shape in SIZES.items():
        params = gpt(*shape, seed=0)
        gradients = jax.tree.map(lambda w: 0.3 * w, gpt(*shape, seed=1))
        seconds = measured(params, gradients, asked.rounds)
        ratios = {
            row: {
                clock: statistics.median(
                    a / b for a, b in zip(seconds[ours][clock], seconds[theirs][clock], strict=True)
                )
                for clock in ("wall", "processor")
            }
            for row, (ours, theirs) in PAIRS.items()
        }
        numel = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"{size}: {numel:,} parameters, {asked.rounds} rounds")
        for row, ratio in ratios.items():
            print(f"  {row:<30} wall {ratio['wall']:.2f}   processor {ratio['processor']:.2f}")
        sizes[size] = {"parameters": numel, "ratios": ratios, "milliseconds": _milliseconds(seconds)}
    if asked.out:
        about = {
            "command": "python benchmarks/jax_overhead.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} shared cores",
            "versions": f"jax {jax.__version__}, optax {optax.__version__}",
            "rounds": asked.rounds,
            "pairs": {row: " / ".join(pair) for row, pair in PAIRS.items()},
            "load_average": os.getloadavg()[0],
        }
        asked.out.write_text(json.dumps({"about": about, "sizes": sizes}, indent=1) + "\n", encoding="utf8")


def _milliseconds(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    return {name: {k: [round(s * 1e3, 3) for s in v] for k, v in by.items()} for name, by in seconds.items()}


if __name__ == "__main__":
    main()
