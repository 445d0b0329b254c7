"""Does the top finding of gs.diagnose name the guilty module? Planted faults, and healthy nets beside them.

    OMP_NUM_THREADS=1 python benchmarks/attribution.py          # about 5 minutes on one core

Writes benchmarks/results/attribution.json: every fault with its module, its size and the top finding, and the table.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.chain.fault_models import MODELS, reinitialise
from benchmarks.chain.faults import FAULTS
from benchmarks.chain.record import save
from gradsplit.diagnose.diagnosis import EXPLODING, diagnose

INITS = ("default", "xavier", "kaiming", "orthogonal", "default")


def names(finding_name: str, guilty: set[str]) -> bool:
    """Whether a finding's name is a guilty module or lies inside one."""
    return any(finding_name == name or finding_name.startswith(name + ".") for name in guilty)


def plant(fault: str, model_name: str, seed: int) -> dict:
    """Plant one fault and diagnose it."""
    torch.manual_seed(seed)
    model, loss_fn, batch = MODELS[model_name](seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    model, loss_fn, guilty, detail = FAULTS[fault].plant(model, loss_fn, batch, generator)
    result = diagnose(model, loss_fn, batch)
    top = result.findings[0] if result.findings else None
    return {
        "fault": fault,
        "model": model_name,
        "seed": seed,
        "guilty": sorted(guilty),
        "detail": detail,
        "top": None if top is None else [top.kind, top.name, top.sentence],
        "right": top is not None and names(top.name, guilty),
        "rank": next((i + 1 for i, f in enumerate(result.findings) if names(f.name, guilty)), None),
    }


def healthy(model_name: str, seed: int) -> dict:
    """Diagnose a net without a fault, in one of several sound initialisations."""
    torch.manual_seed(seed)
    model, loss_fn, batch = MODELS[model_name](seed)
    init = INITS[seed % len(INITS)]
    reinitialise(model, init, model_name)
    findings = diagnose(model, loss_fn, batch).findings
    return {
        "model": model_name,
        "seed": seed,
        "init": init,
        "findings": [[f.kind, f.name, f.sentence] for f in findings],
        "false_alarm": any(f.kind in EXPLODING for f in findings),
    }


def as_markdown(data: dict) -> str:
    """The table of the documentation from the raw results."""
    models = list(dict.fromkeys(row["model"] for row in data["rows"]))
    lines = [f"| fault | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for fault, by_model in data["table"].items():
        cells = ["{} of {}".format(*by_model[name]) if name in by_model else "" for name in models]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one model")
    parser.add_argument("--healthy", type=int, default=10, help="healthy nets per model")
    parser.add_argument("--offset", type=int, default=0, help="first seed; the published table uses seeds kept for it")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, rows, sound = time.time(), [], []
    for model_name in MODELS:
        if options.only not in (None, model_name):
            continue
        for fault, entry in FAULTS.items():
            if model_name in entry.without:
                continue
            for number in range(entry.count):
                row = plant(fault, model_name, options.offset + number)
                rows.append(row)
                if not row["right"]:
                    print("missed", row["fault"], row["model"], row["guilty"], row["detail"], row["top"], row["rank"])
        sound.extend(healthy(model_name, options.offset + seed) for seed in range(options.healthy))
    cells: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in rows:
        cells[row["fault"]][row["model"]][0] += row["right"]
        cells[row["fault"]][row["model"]][1] += 1
    for fault, by_model in cells.items():
        print(f"{fault:24s}", "  ".join(f"{name} {right}/{count}" for name, (right, count) in by_model.items()))
    right, alarms = sum(row["right"] for row in rows), sum(row["false_alarm"] for row in sound)
    print(
        f"{right} of {len(rows)} faults named first; {alarms} of {len(sound)} healthy nets with a finding of explosion"
    )
    for row in sound:
        if row["false_alarm"]:
            print("false alarm", row)
    print(f"{time.time() - began:.0f} s")
    if not options.dry:
        table = {fault: {name: list(pair) for name, pair in by.items()} for fault, by in cells.items()}
        data = {"right": right, "faults": len(rows), "healthy": len(sound), "false_alarms": alarms, "table": table,
                "offset": options.offset, "seconds": time.time() - began, "rows": rows, "sound": sound}  # fmt: skip
        command = f"OMP_NUM_THREADS=1 python benchmarks/attribution.py --offset {options.offset}"
        print(save("attribution", command, data))


if __name__ == "__main__":
    main()
