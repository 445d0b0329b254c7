"""Seconds of the ladder at orders 1 to 99 on the small text model, and of nested autograd as far as it goes.

Both run in processes of their own, so that the memory is theirs. Nested autograd may take LIMIT_SECONDS for its last
order and LIMIT_GB in all.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time

import torch

from benchmarks.ladder.gpt import problem
from benchmarks.ladder.raw import load, save

ORDERS = (1, 3, 10, 30, 99)
LIMIT_GB = 8
LIMIT_SECONDS = 100  # of CPU, so that other work on the machine does not decide where nested autograd ends


def ladder(order: int) -> dict:
    """One ladder along minus the gradient, tracing included."""
    from gradsplit.ladder import taylor_ladder

    loss_of_params, params, _ = problem()
    start, cpu_start = time.perf_counter(), time.process_time()
    found = taylor_ladder(loss_of_params, params, order=order)
    return {
        "order": order,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "log10_derivatives": found.derivative.log10[:, 0].tolist(),
        "signs": found.derivative.sign[:, 0].tolist(),
        "radius": found.radius_B[0],
        "safe_step": found.safe_step_B[0],
    }


def nested() -> None:
    """Derivatives by differentiating again and again; prints one line of JSON per order until a limit is met."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GB * 2**30, LIMIT_GB * 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
    loss_of_params, params, _ = problem()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradient = torch.autograd.grad(loss_of_params(leaves), list(leaves.values()))
    direction = {name: -g for name, g in zip(leaves, gradient, strict=True)}
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    start, cpu_start = time.perf_counter(), time.process_time()
    with sdpa_kernel(SDPBackend.MATH):
        value = loss_of_params({name: p + t * direction[name] for name, p in params.items()})
        for order in range(1, 30):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            row = {
                "order": order,
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
                "derivative": value.item(),
                "peak_gb": peak,
            }
            print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="orders of the ladder; --only alone: nested autograd")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.child == "nested":
        nested()
    elif options.child:
        print(json.dumps(ladder(int(options.child))))
    else:
        measure(options.threads, ORDERS if options.only is None else tuple(options.only), nested_too=not options.only)


def measure(threads: int, orders: tuple[int, ...], nested_too: bool) -> None:
    name = f"cost-{threads}-threads"
    before = load(name)
    rows = {row["order"]: row for row in before.get("ladder", [])}
    for order in orders:
        rows[order] = json.loads(child(str(order), threads).stdout)
        print(_line(rows[order]), flush=True)
    nested_rows, ended = before.get("nested", []), before.get("nested_ended", "")
    if nested_too:
        done = child("nested", threads)
        nested_rows = [json.loads(line) for line in done.stdout.splitlines()]
        ended = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{LIMIT_SECONDS} s of CPU"
        for row in nested_rows:
            print("nested", _line(row))
        print("nested autograd ended by:", ended)
    longest = max(rows)
    exact = {row["order"]: row["derivative"] for row in nested_rows}
    error = {
        k: abs(rows[longest]["signs"][k] * 10 ** rows[longest]["log10_derivatives"][k] / d - 1)
        for k, d in exact.items()
        if k <= longest
    }
    slope = {
        f"{a} to {b}": math.log(rows[b]["cpu_seconds"] / rows[a]["cpu_seconds"]) / math.log(b / a)
        for a, b in zip(sorted(rows), sorted(rows)[1:])  # noqa: B905 - successive pairs
    }
    path = save(
        name,
        {
            "model": "GPT, 4 layers, width 128, 4 heads, 813,568 parameters, 4 sequences of 64 characters, float64",
            "ladder": [rows[order] for order in sorted(rows)],
            "growth_exponent": slope,
            "nested": nested_rows,
            "nested_ended": ended,
            "nested_limits": {"gb": LIMIT_GB, "seconds": LIMIT_SECONDS},
            "relative_difference_to_nested": error,
        },
    )
    print(f"relative difference to nested autograd: {error}\n{path}")


def _line(row: dict) -> str:
    return (
        f"order {row['order']:3d}: {row['seconds']:7.2f} s, {row['cpu_seconds']:7.2f} s of CPU, {row['peak_gb']:.1f} GB"
    )


def child(what: str, threads: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, sys.argv[0], "cost", "--threads", str(threads), "--child", what]
    return subprocess.run(command, capture_output=True, text=True, check=False)
