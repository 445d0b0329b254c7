"""Does `gradsplit run --watch` name the step and the module of a fault planted in a training script?

Ten small scripts of different shapes (`benchmarks/scripts/`). Each gets six faults per seed set, one per run, and four
healthy runs of other seeds, rates and widths. The judge is `gradsplit report`'s account of the run file, and nothing
else. Kinds of faults: a NaN made in the forward pass or in the backward pass of one module, a factor in the backward
pass, weights x 1000, the learning rate x 30, a batch x 1000, and one NaN in a batch.

What counts as right:
- step: within one of the step at which the fault was planted;
- module: the module of the fault. Of a bad batch or a NaN in it: the batch, or the first module. Of a rate: the rate.
  A rate and a batch count also where the report only mentions them, since the loss went on as before.
- a healthy run: nothing is named, and no batch is told.

A run without a fault is healthy if its losses stay finite and below ten times the mean of its first tenth. That is read
from what the script prints, before the account is looked at. Of the first 80 runs without a fault 78 stayed below 3.6
times, and the other two reached 38 and 139 times. A run that is not healthy is right if something is named. A fault is
void where the losses before it had gone beyond ten times their start.

Sets: "development" are five scripts that the rules were made on. "held out" are the other five, looked at once when
the rules stood. "fresh" and "fresh 2" are all ten with other seeds, faults, places and sizes.

Run: python benchmarks/attribution_scripts.py --set development --out benchmarks/results/attribution-scripts.jsonl
Runs that the file has already are left out; --judge reads the kept run files again with the rules of now.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gradsplit.watch.record import RunFile
from gradsplit.watch.report.account import Account, account_of
from gradsplit.watch.report.text import headline

ROOT = Path(__file__).resolve().parents[1]
ALL = ("forward", "backward", "factor", "weights", "rate", "batch", "pixel")
WITHOUT_FLOATS = ("forward", "backward", "factor", "weights", "rate")  # token ids have no factor and no NaN
BY_HAND = ("forward", "backward", "factor", "weights")  # and a rate inside an expression cannot be seen
SCRIPTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "gan": (70, ALL),
    "recurrent": (80, ALL),
    "amp": (80, ALL),
    "two_ranks": (70, ALL),
    "by_hand": (80, BY_HAND),
    "trainer": (70, WITHOUT_FLOATS),
    "accumulation": (70, ALL),
    "compiled": (80, ALL),
    "lbfgs": (40, ALL),
    "ppo": (96, ALL),
}
DEVELOPMENT = ("gan", "recurrent", "amp", "two_ranks", "by_hand")
FAULTS, HEALTHY = 6, 4
SETS = {"development": 0, "held out": 0, "fresh": 1, "fresh 2": 2}
SOUND = 10.0  # times its start: the largest loss of a healthy run


def runs_of(name: str) -> list[dict[str, Any]]:
    """Return the runs of a set, faults and healthy runs of one script after the other."""
    scripts = list(SCRIPTS)
    if not SETS[name]:
        scripts = [script for script in SCRIPTS if (script in DEVELOPMENT) == (name == "development")]
    made: list[dict[str, Any]] = []
    for script in scripts:
        steps, kinds = SCRIPTS[script]
        rng = np.random.default_rng([SETS[name], list(SCRIPTS).index(script)])
        order = [str(kind) for kind in rng.permutation(kinds)]
        for i in range(FAULTS):
            kind = order[i % len(order)]
            early = rng.random() < 0.25
            made.append(
                {
                    "script": script,
                    "seed": int(rng.integers(1000, 10_000)),
                    "fault": kind,
                    "at": int(rng.integers(1, 8) if early else rng.integers(8, steps - 15)),
                    "lasting": bool(kind not in ("weights", "rate", "batch") and rng.random() < 0.5),
                    "where": round(float(rng.random()), 4),
                    "size": float(f"{10 ** rng.uniform(2, 5):.3g}") if kind == "factor" else 1e3,
                    "variant": int(rng.integers(3)),
                    "rank": int(rng.integers(2)) if script == "two_ranks" else 0,
                }
            )
        for i in range(HEALTHY):
            made.append(
                {
                    "script": script,
                    "seed": int(rng.integers(1000, 10_000)),
                    "rate": [1.0, 0.3, 2.0, 1.0][i],
                    "width": [1.0, 1.0, 1.0, 2.0][i] if i else float(rng.choice([0.5, 1.0])),
                }
            )
    return made


def words_of(run: dict[str, Any]) -> list[str]:
    """Return the arguments of the script."""
    words: list[str] = []
    for key, value in run.items():
        if key == "script" or value is False:
            continue
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


class Served:
    """One process under ``gradsplit run --watch`` that runs each script in a forked child of its own.

    So torch is imported once. The child attaches and records as any forked child of a watched script does.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_runs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gradsplit", "run", "--watch", "--quiet", str(Path(__file__).resolve()), "--serve"],
            cwd=folder,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: list[str], folder: Path) -> tuple[int, str]:
        """Run one script; its run files come to ``folder``. Return its exit code and what it printed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for old in self._folder.glob("run*.db*"):
            old.unlink()
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        for made in self._folder.glob("run*.db"):
            made.replace(folder / made.name)
        return answer["code"], answer["text"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Run the scripts that are asked for on standard input, each in a forked child; answer with what it printed."""
    import runpy
    import socket
    import tempfile

    import torch
    import transformers

    transformers.Trainer, transformers.GPT2LMHeadModel  # noqa: B018 - imported when they are first asked for
    torch.set_num_threads(1)
    for line in sys.stdin:
        words = json.loads(line)
        ranks = 2 if Path(words[0]).stem == "two_ranks" else 1
        with socket.socket() as free, tempfile.TemporaryFile("w+") as out:
            free.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
            free.close()
            children = []
            for rank in range(ranks):
                child = os.fork()
                if child == 0:
                    if ranks > 1:
                        os.environ |= {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                    os.dup2(out.fileno(), 1)
                    sys.stdin = open(os.devnull)  # noqa: SIM115 - until the child ends
                    sys.argv, code = words, 1
                    try:
                        runpy.run_path(sys.argv[0], run_name="__main__")
                        code = 0
                    finally:
                        sys.stdout.flush()
                        os._exit(code)  # what was recorded is written first
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            out.seek(0)
            print(json.dumps({"code": max(codes, key=abs), "text": out.read()}), flush=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip


def carry_out(run: dict[str, Any], folder: Path, served: Served) -> dict[str, Any]:
    """Run the script under `gradsplit run --watch` and return what it printed."""
    script = str(ROOT / "benchmarks" / "scripts" / f"{run['script']}.py")
    began = time.time()
    code, printed = served.run([script, *words_of(run)], folder)
    told: dict[str, Any] = {}
    for line in printed.splitlines():
        if line.startswith("PLANTED "):
            told |= json.loads(line.removeprefix("PLANTED "))
    return {**told, "code": code, "seconds": round(time.time() - began, 1)}


def judged(run: dict[str, Any], told: dict[str, Any], account: Account) -> dict[str, Any]:
    """Return what the account says, and whether that is right."""
    first = account.first
    said: dict[str, Any] = {"said": headline(account)}
    if first is not None:
        module = first.tensor.rpartition(".")[0]
        said |= {"said_step": first.step, "said_kind": first.kind, "said_module": module}
    larger = next((stream.larger[0] for stream in account.streams if stream.larger[1]), None)
    if larger is not None:
        said["said_larger"] = larger
    if "fault" not in run:
        sound = is_sound(told)
        return {**said, "healthy": sound, "right": (first is None and larger is None) if sound else first is not None}
    said["void"] = float(told.get("before", 0.0)) > SOUND * float(told.get("start", math.inf))
    if first is None and run["fault"] == "batch" and larger is not None:
        return {**said, "right_step": abs(larger - run["at"]) <= 1, "right_module": True}
    raised = next((stream.raised[0] for stream in account.streams if stream.raised[1]), None)
    if first is None and run["fault"] == "rate" and raised is not None:
        return {**said, "said_raised": raised, "right_step": abs(raised - run["at"]) <= 1, "right_module": True}
    if first is None:
        return {**said, "right_step": False, "right_module": False}
    planted = {told.get("module")}
    if run["fault"] in ("batch", "pixel"):
        right = first.kind in ("batch", "input") or module == told.get("first_module")
    elif run["fault"] == "rate":
        right = first.kind == "rate" or first.rate_times >= 5
    else:
        right = module in planted
    return {**said, "right_step": abs(first.step - run["at"]) <= 1, "right_module": right}


def is_sound(told: dict[str, Any]) -> bool:
    """Whether a run without a fault was healthy by its own losses."""
    return bool(told.get("finite")) and float(told["largest"]) <= SOUND * float(told["first"])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of right answers, by script and by kind."""
    lines = ["| | faults | step right | module right | false alarms in healthy runs |", "|---|---|---|---|---|"]
    void = [row for row in rows if row.get("void")]
    rows = [row for row in rows if not row.get("void")]
    kinds = [kind for kind in ALL if any(row["run"].get("fault") == kind for row in rows)]
    scripts = [script for script in SCRIPTS if any(row["run"]["script"] == script for row in rows)]
    for label in [*scripts, *kinds, "all"]:
        mine = [row for row in rows if label in ("all", row["run"]["script"], row["run"].get("fault"))]
        bad = [row for row in mine if "fault" in row["run"]]
        well = [row for row in mine if "fault" not in row["run"] and row.get("healthy", True)]
        accused = f"{sum(not row['right'] for row in well)} of {len(well)}" if well else ""
        right = [sum(bool(row[key]) for row in bad) for key in ("right_step", "right_module")]
        lines.append(f"| {label} | {len(bad)} | {right[0]} | {right[1]} | {accused} |")
    ill = [row for row in rows if not row.get("healthy", True)]
    told = sum(bool(row["right"]) for row in ill)
    lines.append(f"\n{len(ill)} runs without a fault were not healthy, {told} of them named; {len(void)} faults void")
    return "\n".join(lines)


def main() -> None:
    """Carry out what is missing, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(SETS), default="development")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "attribution-scripts.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("attribution-runs"), help="where run files are kept")
    parser.add_argument("--judge", action="store_true", help="judge the kept run files anew, run nothing")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    served: Served | None = None
    runs = runs_of(asked.set)
    if asked.list:
        print("\n".join(json.dumps(run) for run in runs))
        return
    kept = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    mine = {json.dumps(row["run"]): row for row in kept if row["set"] == asked.set}
    for number, run in enumerate(runs):
        key, folder = json.dumps(run), asked.folder.resolve() / asked.set.replace(" ", "-") / str(number)
        if key in mine and not asked.judge:
            continue
        if asked.judge:
            if key not in mine:
                continue
            told = mine[key]["told"]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("run*.db*"):
                old.unlink()
            if served is None:
                (asked.folder / "served").mkdir(parents=True, exist_ok=True)
                served = Served((asked.folder / "served").resolve())
            told = carry_out(run, folder, served)
        row = {"set": asked.set, "run": run, "told": told}
        if (folder / "run.db").exists():
            with RunFile(folder / "run.db") as file:
                row |= judged(run, told, account_of(file))
        else:
            row |= {"said": "nothing was recorded", "right": False, "right_step": False, "right_module": False}
        row |= {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "machine": f"{platform.machine()}, 1 thread of 2 shared cores, no GPU",
        }
        mine[key] = row
        if not asked.judge:
            with asked.out.open("a", encoding="utf8") as out:
                out.write(json.dumps(_plain(row)) + "\n")
        wrong = not row["right"] if "fault" not in run else not (row["right_step"] and row["right_module"])
        if wrong:
            shown = {**run, "module": told.get("module"), "first": told.get("first"), "last": told.get("last")}
            print(
                f"WRONG {number} {shown}\n   -> {row.get('said_step')} {row.get('said_kind')} {row['said']}", flush=True
            )
    if served is not None:
        served.close()
    if asked.judge:
        others = [row for row in kept if row["set"] != asked.set]
        asked.out.write_text("".join(json.dumps(_plain(row)) + "\n" for row in [*others, *mine.values()]))
    print(table(list(mine.values())))


def _plain(value: Any) -> Any:
    """JSON has no nan and no inf: their names instead."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
