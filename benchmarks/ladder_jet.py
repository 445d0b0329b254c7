"""jax.experimental.jet on the small text model of benchmarks/ladder.py: seconds per order, and where it stops.

It needs JAX and numpy alone, so it can run in an environment of its own:

    python benchmarks/ladder.py weights weights.npz
    python benchmarks/ladder_jet.py weights.npz                    # writes benchmarks/results/ladder-jet.json
    python benchmarks/ladder_jet.py weights.npz --cpu-seconds 900  # gives every order 15 minutes of CPU

jet computes truncated series too. It is run as its documentation says, uncompiled and compiled with jax.jit, on the
same parameters, direction and text, in float64. Every order runs in a process of its own, which the system stops after
`--cpu-seconds` or at `--gigabytes`; the row then says so, and that way of running ends there. The file is written after
each order, and a second run goes on behind the last one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.jet import jet

HEADS, LAYERS = 4, 4
ORDERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 99)
WAYS = ("uncompiled", "jit")
RESULT = Path(__file__).resolve().parent / "results" / "ladder-jet.json"


def norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + jax.lax.erf(x / np.sqrt(2)))


def softmax(x):
    e = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


def loss(p, text):
    index, target = text[:, :-1], text[:, 1:]
    x = p["tokens.weight"][index] + p["places.weight"][: index.shape[1]]
    batch, length, width = x.shape
    hidden = jnp.tril(jnp.ones((length, length))) == 0
    for i in range(LAYERS):
        b = f"blocks.{i}."
        y = norm(x, p[b + "norm1.weight"], p[b + "norm1.bias"]) @ p[b + "qkv.weight"].T
        q, k, v = y.reshape(batch, length, 3, HEADS, width // HEADS).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(width // HEADS) + jnp.where(hidden, -1e30, 0.0)
        mixed = (softmax(scores) @ v).swapaxes(1, 2).reshape(batch, length, width)
        x = x + mixed @ p[b + "out.weight"].T
        y = norm(x, p[b + "norm2.weight"], p[b + "norm2.bias"])
        x = x + gelu(y @ p[b + "up.weight"].T) @ p[b + "down.weight"].T
    logits = norm(x, p["norm.weight"], p["norm.bias"]) @ p["head.weight"].T
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_total = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
    picked = (logits * jax.nn.one_hot(target, logits.shape[-1])).sum(-1)
    return (log_total - picked).mean()


def derivatives(data: np.lib.npyio.NpzFile, order: int, way: str) -> list[float]:
    """Derivatives 1 to order of the loss along the direction."""
    text = data["text"]
    params = {name[2:]: jnp.asarray(data[name]) for name in data.files if name.startswith("p.")}
    direction = {name[2:]: jnp.asarray(data[name]) for name in data.files if name.startswith("d.")}
    names = list(params)

    def along(*values):
        return loss(dict(zip(names, values, strict=True)), text)

    def all_orders():
        series = [[direction[n]] + [jnp.zeros_like(direction[n])] * (order - 1) for n in names]
        _, higher = jet(along, [params[n] for n in names], series)
        return higher

    return [float(value) for value in (jax.jit(all_orders) if way == "jit" else all_orders)()]


def one_order(path: str, order: int, way: str, cpu_seconds: int, gigabytes: float) -> None:
    """What a child process does: one order within its limits, its row as JSON on standard output."""
    # The system ends the process at its limit, even in the middle of a compilation.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9),) * 2)
    jax.config.update("jax_enable_x64", True)
    data = np.load(path)
    start, cpu_start = time.perf_counter(), time.process_time()
    found = derivatives(data, order, way)
    row = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "relative_difference": [
            abs(a / b - 1) for a, b in zip(found, data["derivatives"][1 : order + 1], strict=False)
        ],
    }
    print(json.dumps(row))


def measured(path: str, order: int, way: str, cpu_seconds: int, gigabytes: float) -> dict:
    """The row of one order; with "stopped" where it did not come to its end."""
    start = time.perf_counter()
    command = [sys.executable, __file__, path, "--child", way, str(order)]
    command += ["--cpu-seconds", str(cpu_seconds), "--gigabytes", str(gigabytes)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = child.communicate()
    took = time.perf_counter() - start
    row = {"way": way, "order": order, "date": datetime.date.today().isoformat(), "cores": len(os.sched_getaffinity(0))}
    if child.returncode == 0:
        return {**row, **json.loads(out.splitlines()[-1])}
    if child.returncode == -signal.SIGXCPU:
        why = f"stopped after {cpu_seconds} seconds of CPU"
    elif child.returncode < 0:
        why = f"ended by {signal.Signals(-child.returncode).name} after {took:.0f} seconds"
    else:
        why = f"failed after {took:.0f} seconds: {error.strip().splitlines()[-1][:200]}"
    return {**row, "stopped": why, "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="what `benchmarks/ladder.py weights` wrote")
    parser.add_argument("--cpu-seconds", type=int, default=100, help="an order may take so much")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="an order may hold so much memory")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="in this order")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        way, order = options.child
        one_order(options.path, int(order), way, options.cpu_seconds, options.gigabytes)
        return
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    for way in options.ways:
        for order in ORDERS:
            known = [row for row in rows if (row["way"], row["order"]) == (way, order)]
            if not known:
                row = measured(options.path, order, way, options.cpu_seconds, options.gigabytes)
                known = [row]
                rows.append(row)
                save(rows, options)
                print({key: value for key, value in row.items() if key != "relative_difference"}, flush=True)
            if "stopped" in known[0]:
                break


def save(rows: list[dict], options: argparse.Namespace) -> None:
    data = {
        "command": "python benchmarks/ladder_jet.py weights.npz",
        "jax": jax.__version__,
        "limits": {"cpu_seconds": options.cpu_seconds, "gigabytes": options.gigabytes},
        "rows": sorted(rows, key=lambda row: (WAYS.index(row["way"]), row["order"])),
    }
    RESULT.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
