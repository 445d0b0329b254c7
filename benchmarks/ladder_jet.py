"""jax.experimental.jet on the small text model of benchmarks/ladder.py: seconds per order, and where it stops.

It needs JAX and numpy alone, so it can run in an environment of its own:

    python benchmarks/ladder.py weights weights.npz
    python benchmarks/ladder_jet.py weights.npz          # writes benchmarks/results/ladder-jet.json

jet computes truncated series too. It is run as its documentation says, uncompiled and compiled with jax.jit, on the
same parameters, direction and text, in float64, until one order takes longer than LIMIT_SECONDS of CPU.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.jet import jet

HEADS, LAYERS = 4, 4
ORDERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30)
LIMIT_SECONDS = 100
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


def main(path: str) -> None:
    jax.config.update("jax_enable_x64", True)
    data = np.load(path)
    text = data["text"]
    params = {name[2:]: jnp.asarray(data[name]) for name in data.files if name.startswith("p.")}
    direction = {name[2:]: jnp.asarray(data[name]) for name in data.files if name.startswith("d.")}
    names = list(params)

    def along(*values):
        return loss(dict(zip(names, values, strict=True)), text)

    def derivatives(order):
        series = [[direction[n]] + [jnp.zeros_like(direction[n])] * (order - 1) for n in names]
        first, higher = jet(along, [params[n] for n in names], series)
        return [first, *higher]

    rows, ended = [], {}
    for way in ("uncompiled", "jit"):
        for order in ORDERS:
            run = (lambda: derivatives(order)) if way == "uncompiled" else jax.jit(lambda: derivatives(order))  # noqa: B023
            start, cpu_start = time.perf_counter(), time.process_time()
            try:
                found = [float(value) for value in run()]
            except Exception as error:
                ended[way] = f"order {order}: {type(error).__name__}: {str(error)[:200]}"
                break
            row = {
                "way": way,
                "order": order,
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                "relative_difference": [
                    abs(a / b - 1) for a, b in zip(found[1:], data["derivatives"][1 : order + 1], strict=False)
                ],
            }
            rows.append(row)
            print(
                f"{way:10s} order {order:2d}: {row['seconds']:7.2f} s, {row['cpu_seconds']:7.2f} s of CPU, "
                f"{row['peak_gb']:.1f} GB, difference {max(row['relative_difference']):.1e}",
                flush=True,
            )
            if row["cpu_seconds"] > LIMIT_SECONDS:
                ended[way] = f"order {order} took more than {LIMIT_SECONDS} s of CPU"
                break
        print(way, "ended:", ended.get(way, "not"))
        RESULT.write_text(
            json.dumps(
                {
                    "command": "python benchmarks/ladder_jet.py weights.npz",
                    "date": datetime.date.today().isoformat(),
                    "jax": jax.__version__,
                    "rows": rows,
                    "ended": ended,
                    "limit_seconds": LIMIT_SECONDS,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main(sys.argv[1])
