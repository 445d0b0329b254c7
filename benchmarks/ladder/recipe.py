"""The recipe of 292 steps on a small tanh network: every step's magnitude, and where other arithmetic dies."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradsplit as gs
from benchmarks.ladder.raw import save
from gradsplit.ladder import climb_figure, climb_rows, ladder_figure, ladder_of_model, ladder_table

SHOWN = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 50, 54, 90, 119, 120, 200, 292)


def small_network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Three tanh layers of width 16 and a batch of 32, float64, the same every time."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    ).double()
    return model, (torch.randn(32, 8, dtype=torch.float64), torch.randint(4, (32,)))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--html", help="also draw both figures into this file (needs plotly)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, batch = small_network()
    plan = gs.per_tensor(gs.layout_of(model))
    ladder = ladder_of_model(
        model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch, bins=plan, order=99, recipe="ladder-292"
    )
    assert ladder.climb is not None
    print(ladder_table(ladder))
    bins = {}
    for b, name in enumerate(ladder.names):
        bins[name] = {
            "float32_dies_at": int(ladder.climb.died_B("float32")[b]),
            "float64_dies_at": int(ladder.climb.died_B("float64")[b]),
            "log10_magnitude": ladder.climb.value.log10[:, b].tolist(),
            "sign": ladder.climb.value.sign[:, b].tolist(),
            "log10_true_derivative_of_said_order": [
                None if sign != sign else float(value)
                for sign, value in zip(ladder.climb.said.sign[:, b], ladder.climb.said.log10[:, b], strict=True)
            ],
        }
        print(
            f"{name}: float32 dies at step {bins[name]['float32_dies_at']}, float64 at {bins[name]['float64_dies_at']}"
        )
    rows = climb_rows(ladder.climb)
    columns = list(rows[0])
    print(f"\n{ladder.names[0]}\n" + " | ".join(columns))
    for step in SHOWN:
        print(" | ".join(rows[step - 1].values()))
    print(
        save(
            "recipe", {"network": small_network.__doc__, "plan": "per_tensor", "bins": bins, "rows_of_first_bin": rows}
        )
    )
    if options.html:
        draw(options.html, ladder_figure(ladder), climb_figure(ladder.climb))


def draw(path: str, *figures: dict) -> None:
    """Both figures in one self-contained page."""
    import plotly.graph_objects as go

    with open(path, "w", encoding="utf8") as page:
        for number, figure in enumerate(figures):
            page.write(go.Figure(figure).to_html(full_html=False, include_plotlyjs=number == 0))
    print(path)
