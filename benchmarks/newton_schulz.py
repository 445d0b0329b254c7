"""What the forms of Newton-Schulz cost on a processor: products of the whole matrix, gathered polynomials, bfloat16.

    python benchmarks/newton_schulz.py              # writes benchmarks/results/gso/newton_schulz.json, prints a table

Processor time, one thread, the forms in turns. Errors are relative to float64, of random matrices and of such whose
singular values fall over six powers of ten. The shapes are those of the text GPT together, and larger ones.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from gradsplit.lab import evidence
from gradsplit.optim.directions.orthogonal import COEFFICIENTS, orthogonalised

PLACE = Path(__file__).parent / "results" / "gso" / "newton_schulz.json"
GPT = [(3, 192, 64), (3, 64, 64), (3, 256, 64), (3, 64, 256), (1, 103, 64)]
CASES: dict[str, tuple[list[tuple[int, int, int]], int]] = {
    "text GPT, 13 matrices": (GPT, 20),
    "4 of 256 x 256": ([(4, 256, 256)], 3),
    "4 of 1024 x 256": ([(4, 1024, 256)], 2),
}
"""Name -> (stacks of matrices, calls per turn)."""

TURNS = 11


def products(x: Tensor) -> Tensor:
    """Five steps, each a product with the whole matrix."""
    a, b, c = COEFFICIENTS
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if flip else x


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "products": products,
    "gathered where long": orthogonalised,
    "products in bfloat16": lambda x: products(x.bfloat16()).to(x.dtype),
}


def matrices(stacks: list[tuple[int, int, int]], powers: float) -> list[Tensor]:
    """Random matrices, whose singular values fall over some powers of ten."""
    torch.manual_seed(0)
    made = []
    for stack in stacks:
        u, values, vh = torch.linalg.svd(torch.randn(stack, dtype=torch.float64), full_matrices=False)
        if powers:
            values = torch.logspace(0, -powers, values.shape[-1], dtype=torch.float64).expand_as(values)
        made.append((u * values[:, None]) @ vh)
    return made


def row(name: str) -> dict[str, Any]:
    """Milliseconds and errors of every form."""
    stacks, calls = CASES[name]
    given = [x.float() for x in matrices(stacks, 0.0)]
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(-1, TURNS):
        for form, make in FORMS.items():
            start = time.process_time()
            for _ in range(calls):
                for x in given:
                    make(x)
            if turn >= 0:
                times[form].append(1e3 * (time.process_time() - start) / calls)
    found: dict[str, Any] = {"case": name, "stacks": stacks, "turns_ms": times, "forms": {}}
    for form, make in FORMS.items():
        ratios = sorted(a / b for a, b in zip(times[form], times["products"], strict=True))
        errors = {}
        for powers in (0.0, 6.0):
            true = [products(x) for x in matrices(stacks, powers)]
            made = [make(x.float()).double() for x in matrices(stacks, powers)]
            errors[powers] = max(float((m - t).norm() / t.norm()) for m, t in zip(made, true, strict=True))
        found["forms"][form] = {
            "ms": statistics.median(times[form]),
            "ratio": statistics.median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
            "error_random": errors[0.0],
            "error_six_powers": errors[6.0],
        }
    return found


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    rows = []
    for name in CASES:
        rows.append(row(name))
        for form, told in rows[-1]["forms"].items():
            low, high = told["ratio_range"]
            print(
                f"{name} | {form} | {told['ms']:.3f} ms | {told['ratio']:.2f} [{low:.2f} to {high:.2f}] | "
                f"{told['error_random']:.0e} | {told['error_six_powers']:.0e}",
                flush=True,
            )
    PLACE.write_text(
        json.dumps({**evidence.conditions(), "clock": "process_time", "rows": rows}, indent=1) + "\n", "utf8"
    )


if __name__ == "__main__":
    main()
