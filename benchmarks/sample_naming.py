"""How often `gradsplit run --samples` names the right samples: faults planted into single samples, over 20 seeds.

A small regression, pictures with BatchNorm, and sequences in an LSTM are trained for 60 steps; step 40 has the fault.
What is judged is the report: the samples that it names at the first departure. Precision is over the samples that were
named, recall over those that were planted in runs with a departure at that step; "departure" counts these. The seeds
are those from 100 on; the constants were chosen on others.

Run: python benchmarks/sample_naming.py --out benchmarks/results/sample_naming.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gradsplit.watch.record import Recorder, RunFile, RunWriter
from gradsplit.watch.report.account import account_of
from gradsplit.watch.run.settings import Settings
from gradsplit.watch.run.track import Track

SEEDS, STEPS, AT, SIZE = range(100, 120), 60, 40, 32


class Last(nn.Module):
    """An LSTM whose last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One number per sequence."""
        return self.head(self.net(x)[0][:, -1])


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """A linear law with noise."""
    x = torch.randn(SIZE, 8)
    return x, 2 * x[:, :1] + 0.1 * torch.randn(SIZE, 1)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Five classes of noisy pictures."""
    target = torch.randint(5, (SIZE,))
    return torch.randn(SIZE, 1, 8, 8) + target[:, None, None, None], target


def sequences() -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of a sequence."""
    x = torch.randn(SIZE, 10, 6)
    return x, x.mean((1, 2))[:, None]


NETS: dict[str, tuple[Any, Any]] = {
    "regression": (
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)),
        rows,
    ),
    "pictures, BatchNorm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)),
        ),
        pictures,
    ),
    "LSTM": (Last, sequences),
}
FAULTS = {
    "one NaN in a sample": (1, ("regression", "pictures, BatchNorm", "LSTM")),
    "three samples with a NaN": (3, ("regression", "pictures, BatchNorm", "LSTM")),
    "a sample x 1e4": (1, ("regression", "pictures, BatchNorm")),
    "three samples x 1e4": (3, ("regression",)),
    "a target off by 1000": (1, ("regression", "LSTM")),
    "the batch x 1000": (0, ("regression", "pictures, BatchNorm")),
    "all targets off by 1000": (0, ("regression", "LSTM")),
    "none": (0, ("regression", "pictures, BatchNorm", "LSTM")),
}


def plant(fault: str, x: torch.Tensor, target: torch.Tensor, chosen: list[int]) -> None:
    """Put the fault into the batch."""
    if "NaN" in fault:
        for i in chosen:
            x[i].view(-1)[3] = math.nan
    elif "1e4" in fault:
        x[chosen] *= 1e4
    elif fault == "a target off by 1000":
        target[chosen] += 1e3
    elif fault == "the batch x 1000":
        x *= 1e3
    elif fault == "all targets off by 1000":
        target += 1e3


def run(net: str, fault: str, num: int, seed: int, path: Path) -> dict[str, Any]:
    """Train, and return what the report names beside what was planted."""
    torch.manual_seed(seed)
    make, batch = NETS[net]
    chosen = torch.randperm(SIZE)[:num].tolist()
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    recorder = Recorder([RunWriter(path, {"argv": ["train.py"]})], samples=model, seconds=3600.0)
    track = Track(optimizer, 0, Settings(), recorder)
    for step in range(STEPS):
        x, target = batch()
        if step == AT:
            plant(fault, x, target, chosen)
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, target) if target.dim() == 1 else (output - target).square().mean()
        loss.backward()
        track.begin_step()
        track.commit(optimizer, loss.detach())
        optimizer.step()
    recorder.close()
    with RunFile(path) as file:
        account = account_of(file)
    first = account.first
    named = sorted({row.sample for one in account.samples_at_first for row in one.rows})
    step = None if first is None else first.step
    found = {"net": net, "fault": fault, "seed": seed, "step": step, "planted": sorted(chosen), "named": named}
    inputs = [one for stream in account.streams for one in stream.samples if one.by == "input" and one.rows]
    return {**found, "inputs": sorted([one.step, row.sample] for one in inputs for row in one.rows)}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Departures, precision and recall of some runs."""
    runs, inputs = len(found), None
    if all("inputs" in one for one in found):  # samples that stood out by their input, in any step of any run
        told = [(one, step, sample) for one in found for step, sample in one["inputs"]]
        right = sum(step == AT and sample in one["planted"] for one, step, sample in told)
        inputs = {"inputs": len(told), "inputs right": right}
    found = [one for one in found if one["step"] == AT]
    right = sum(len(set(one["planted"]) & set(one["named"])) for one in found)
    named, planted = (sum(len(one[key]) for one in found) for key in ("named", "planted"))
    return {
        "runs": runs,
        "departure": len(found),
        "named": named,
        "planted": planted,
        "precision": right / named if named else None,
        "recall": right / planted if planted else None,
        **({} if inputs is None else inputs),
    }


def table(runs: list[dict[str, Any]]) -> list[str]:
    """The rows of the documentation's table, one per fault and net."""
    lines = ["| fault | net | departures | precision | recall |", "|---|---|---|---|---|"]
    for fault, net in dict.fromkeys((one["fault"], one["net"]) for one in runs):
        found = summary([one for one in runs if (one["fault"], one["net"]) == (fault, net)])
        named = f"{found['named']} named" if found["named"] and not found["planted"] else "nobody named"
        precision = named if found["precision"] is None or not found["planted"] else f"{found['precision']:.2f}"
        recall = "–" if found["recall"] is None else f"{found['recall']:.2f}"
        lines.append(f"| {fault} | {net} | {found['departure']} of {found['runs']} | {precision} | {recall} |")
    return lines


def main() -> None:
    """Print a line per net and fault, keep every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for fault, (num, nets) in FAULTS.items():
            for net in nets:
                mine = [run(net, fault, num, seed, Path(folder) / f"{len(runs)}-{seed}.db") for seed in SEEDS]
                runs += mine
                print(f"{fault}, {net}: {summary(mine)}", flush=True)
    whole = summary([one for one in runs if one["planted"]])
    print(f"all with planted samples: {whole}")
    if asked.out:
        about = {
            "command": "python benchmarks/sample_naming.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, 1 thread of 2 shared cores, torch {torch.__version__}",
            "seeds": [SEEDS[0], SEEDS[-1]],
        }
        asked.out.write_text(json.dumps({"about": about, "all": whole, "runs": runs}) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
