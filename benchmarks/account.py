"""Does the account name the right tensor and step? 100 injected explosions and 40 healthy runs over four models.

Each run trains a workload with its usual optimizer and learning rate while the recorder of `gradsplit run --watch`
writes a run file; the account is made from that file alone. In an injected run one parameter's gradient is multiplied
by a factor between 30 and 1e6, or one of its entries becomes nan, from a random step on: for that step only, or for all
that follow. About every second run calls torch's clip_grad_norm_ as most scripts do. The statistic's constants were
chosen on seeds 0 to 9 and 1000 to 1024 (--first-seed 0); the published table is from other seeds.

Run: python benchmarks/account.py --out benchmarks/results/account.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsplit.lab.registry import REGISTRY
from gradsplit.watch.record import RunFile
from gradsplit.watch.report.account import Account, account_of
from gradsplit.watch.run.session import Session
from gradsplit.watch.run.settings import Settings

STEPS = 60
EARLIEST = 12  # a tensor needs a history before it can leave it
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv net": ("plain-stack", {"depth": 6, "channels": 8, "batch": 16, "gain": 1.0}),
    "LSTM": ("lstm", {"layers": 2, "width": 24, "context": 16, "batch": 8}),
    "GPT": ("gpt", {"layers": 2, "width": 32, "heads": 2, "context": 24, "batch": 8}),
    "detector": ("detection", {"healthy": True, "width": 4, "batch": 4}),
}


def _optimizer(name: str, parameters: Any, lr: float) -> torch.optim.Optimizer:
    if name.startswith("sgd"):
        return torch.optim.SGD(parameters, lr, momentum=0.9 if name == "sgdm" else 0.0)
    return torch.optim.AdamW(parameters, lr)


def _injection(rng: np.random.Generator, model: torch.nn.Module) -> dict[str, Any]:
    names = [name for name, _ in model.named_parameters()]
    nan = rng.random() < 0.15
    return {
        "tensor": names[int(rng.integers(len(names)))],
        "step": int(rng.integers(EARLIEST, STEPS)),
        "factor": math.nan if nan else float(10 ** rng.uniform(math.log10(30), 6)),
        "lasting": bool(rng.random() < 0.5),
    }


def run(model: str, seed: int, folder: Path, *, inject: bool) -> tuple[Account, dict[str, Any]]:
    """Train once under watch and return the account of the recording, and what was done."""
    workload, options = MODELS[model]
    row = REGISTRY[workload]
    rng = np.random.default_rng([seed, inject, list(MODELS).index(model)])
    task = row.build(seed=seed, **options)
    optimizer = _optimizer(row.optimizer, task.model.parameters(), row.lr)
    injected = _injection(rng, task.model) if inject else {}
    own = float(rng.choice([0.0, 1.0]))
    place = folder / f"{model}-{seed}-{inject}.db".replace(" ", "-")
    session = Session(Settings(record=str(place), seconds=3600.0, quiet=True))
    optimizer.register_step_pre_hook(session.pre)
    parameters = dict(task.model.named_parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        session.losses.note(loss)
        loss.backward()
        if inject and (step == injected["step"] or (injected["lasting"] and step > injected["step"])):
            gradient = parameters[injected["tensor"]].grad
            if math.isnan(injected["factor"]):
                gradient.view(-1)[int(rng.integers(gradient.numel()))] = math.nan
            else:
                gradient.mul_(injected["factor"])
        if own:
            tensors = list(task.model.parameters())
            session.before_own_bound(tensors)
            norm = torch.nn.utils.clip_grad_norm_(tensors, own)
            session.after_own_bound(tensors, (own / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
    session.close()
    with RunFile(place) as file:
        account = account_of(file)
    return account, {"model": model, "seed": seed, "own_bound": own, **injected}


def judged(account: Account, done: dict[str, Any]) -> dict[str, Any]:
    """Return what was done beside what the account says."""
    first = account.first
    said = {} if first is None else {"said_tensor": first.tensor, "said_step": first.step, "score": first.score}
    if "tensor" in done:
        right = first is not None and (first.tensor, first.step) == (done["tensor"], done["step"])
    else:
        right = first is None
    return {**done, **said, "right": right}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of right answers by model."""
    lines = [
        "| model | explosions named (tensor and step) | NaN among them | healthy runs left alone |",
        "|---|---|---|---|",
    ]
    for model in [*MODELS, "all"]:
        mine = [row for row in rows if model in (row["model"], "all")]
        bad = [row for row in mine if "tensor" in row]
        nan = [row for row in bad if math.isnan(row["factor"])]
        well = [row for row in mine if "tensor" not in row]
        cells = [f"{sum(row['right'] for row in part)} of {len(part)}" for part in (bad, nan, well)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    """JSON has no nan and no inf: their names instead."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Run the campaign, print the table, keep every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--explosions", type=int, default=100, help="injected runs over all models")
    parser.add_argument("--healthy", type=int, default=40, help="healthy runs over all models")
    parser.add_argument("--first-seed", type=int, default=5000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        for inject, count in ((True, asked.explosions), (False, asked.healthy)):
            for i in range(count):
                model = list(MODELS)[i % len(MODELS)]
                rows.append(
                    judged(
                        *run(model, asked.first_seed + 1000 * inject + i // len(MODELS), Path(folder), inject=inject)
                    )
                )
                if not rows[-1]["right"]:
                    print("wrong:", rows[-1], flush=True)
    print(table(rows))
    print(f"{len(rows)} runs of {STEPS} steps in {time.time() - began:.0f} s")
    if asked.out:
        about = {
            "command": "python benchmarks/account.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
            "steps": STEPS,
            "first_seed": asked.first_seed,
            "models": {model: {"workload": name, **options} for model, (name, options) in MODELS.items()},
        }
        plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
        text = json.dumps({"about": about, "table": table(rows).splitlines(), "runs": plain}, indent=1)
        asked.out.write_text(text + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
