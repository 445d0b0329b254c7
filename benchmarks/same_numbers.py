"""Whether two trees of the package give the same numbers, bit for bit: digests of fixed small runs.

    python benchmarks/same_numbers.py --out old.json --save saved      with PYTHONPATH at the one tree
    python benchmarks/same_numbers.py --out old.json --load saved
    python benchmarks/same_numbers.py --out new.json --load saved      with PYTHONPATH at the other
    python benchmarks/same_numbers.py --compare old.json new.json      ends with 1 and names what differs

A refactoring shows with it that no number moved. It covers records, parameters, states and losses. With ``--save`` and
``--load`` it also covers what a tree makes of checkpoints, states and run files that the other tree wrote. It uses
public names alone, so that both trees run the same text. It leaves out what differs from run to run: times, process
numbers, folders and versions. All NaN count as one value. What people read (reports, findings) is compared under names
that end with "(text)". Optional packages (jax, optax, keras, tensorflow) take part where they are installed.

``--only 'splitter/xsp/*'`` does a part of it. ``--values FILE`` writes the numbers behind the digests, so that diff can
show them. ``--without '*(text)'`` leaves names out of a comparison.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PARTS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "splitters": ("splitters", ("splitter", "plans", "project"), "", ""),
    "optimizers": ("optimizers", ("gso",), "", ""),
    "ranks": ("ranks", ("sharded",), "", ""),
    "arrays": ("arrays", ("functional", "optax"), "", ""),
    "keras on torch": ("keras_runs", ("keras/torch",), "keras", "torch"),
    "keras on jax": ("keras_runs", ("keras/jax",), "keras jax", "jax"),
    "keras on tensorflow": ("keras_runs", ("keras/tensorflow",), "keras tensorflow", "tensorflow"),
    "signals": ("signals", ("chain", "diagnose", "ladder", "guard"), "", ""),
    "run files": ("run_files", ("run",), "", ""),
    "saved": ("saved", ("loaded",), "", ""),
}
"""Part, a process of its own: its module, what its names begin with, packages it needs, and Keras' backend."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the digests go")
    parser.add_argument("--save", type=Path, help="write checkpoints, states and run files into this folder, too")
    parser.add_argument("--load", type=Path, help="load what --save wrote, go on, and note what comes of it, too")
    parser.add_argument("--only", help="a pattern of names, for example 'gso/*'")
    parser.add_argument("--values", type=Path, help="a file for the numbers behind the digests; large without --only")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="name what differs between two files")
    parser.add_argument("--without", action="append", default=[], help="names not to compare, for example '*(text)'")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.compare:
        sys.exit(compare(*asked.compare, asked.without))
    if asked.out is None:
        parser.error("expected --out FILE or --compare A B")
    if asked.part:
        run_part(asked)
    else:
        run_all(asked)


def compare(first: Path, second: Path, without: list[str]) -> int:
    from same_numbers.sheet import differences

    one, other = (json.loads(place.read_text(encoding="utf8")) for place in (first, second))
    found = differences(one, other, without)
    for line in found:
        print(line)
    names = [line.rpartition(": ")[0].split("/") for line in found if not line.startswith(" ")]
    kinds = collections.Counter(f"{name[0]}/…/{name[-1]}" for name in names)
    for kind, count in sorted(kinds.items()):
        print(f"{count} of {kind}")
    print(f"{len(one['digests'])} digests of {one['about']['gradsplit']}, {len(other['digests'])} of "
          f"{other['about']['gradsplit']}: {f'{len(names)} differ' if names else 'the same'}")  # fmt: skip
    return int(bool(found))


def run_all(asked: argparse.Namespace) -> None:
    """Run every part in a process of its own, one after the other."""
    about = {"gradsplit": _where(), "seconds": {}}
    sheet: dict[str, dict[str, str]] = {"digests": {}, "texts": {}}
    if asked.values:
        asked.values.write_text("", encoding="utf8")
    with tempfile.TemporaryDirectory() as folder:
        for part, (_, begins, needs, backend) in PARTS.items():
            absent = [name for name in needs.split() if importlib.util.find_spec(name) is None]
            if absent or (asked.only and not any(_may_meet(asked.only, begin) for begin in begins)):
                continue
            if part == "saved" and not (asked.save or asked.load):
                continue
            out, began = Path(folder) / f"{part}.json", time.monotonic()
            places = environment(backend)
            words = [sys.executable, __file__, "--part", part, "--out", str(out)]
            for name in ("only", "save", "load"):
                value = getattr(asked, name)
                words += [f"--{name}", str(value)] if value else []
            words += ["--values", str(out.with_suffix(".values"))] if asked.values else []
            compiled = None
            while compiled != (compiled := _compiled(places)):  # a pass that compiled something is made again
                code = subprocess.run(words, env=places, check=False).returncode
            if asked.values:
                with asked.values.open("a", encoding="utf8") as file:
                    for place in sorted(out.parent.glob(f"{part}.values*")):
                        file.write(place.read_text(encoding="utf8"))
            made = json.loads(out.read_text(encoding="utf8")) if out.exists() else {"digests": {}, "texts": {}}
            if code:
                made["digests"][f"{begins[0]}/ended"] = f"with code {code}"
            for kind, entries in made.items():
                sheet[kind].update(entries)
            about["seconds"][part] = round(time.monotonic() - began, 1)
            print(f"{part}: {len(made['digests'])} digests, {about['seconds'][part]} s", flush=True)
    asked.out.write_text(json.dumps({"about": about, **sheet}, indent=0, sort_keys=True), encoding="utf8")
    print(f"{len(sheet['digests'])} digests of {about['gradsplit']} in {asked.out}")


def _compiled(places: dict[str, str]) -> set[tuple[str, int]]:
    """What Numba keeps on disk.

    A loop that was just compiled and the same loop read from disk can differ in the last bit of a sum, since the
    compiler may reassociate sums. So digests are taken of loops that were read.
    """
    folder = Path(places["NUMBA_CACHE_DIR"])
    return {(str(file), file.stat().st_mtime_ns) for file in folder.rglob("*.nbc")}


def _may_meet(pattern: str, begin: str) -> bool:
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0]
    return fixed.startswith(begin) or begin.startswith(fixed)


def _where() -> str:
    found = importlib.util.find_spec("gradsplit")
    if found is None or found.origin is None:
        sys.exit("same_numbers.py: expected the package gradsplit. Set PYTHONPATH to the tree that is to be run.")
    return str(Path(found.origin).resolve().parent)


def environment(backend: str) -> dict[str, str]:
    """One thread everywhere, and compiled loops kept apart for every tree."""
    one = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    cache = Path(tempfile.gettempdir()) / f"same-numbers-{hashlib.sha256(_where().encode()).hexdigest()[:12]}"
    fixed = {
        **dict.fromkeys(one, "1"),
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(cache)),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": backend or "torch",
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "TZ": "UTC",
        "SAME_NUMBERS_TREE": _where(),
    }
    return {**os.environ, **fixed}


def run_part(asked: argparse.Namespace) -> None:
    from same_numbers.sheet import Sheet, settle

    settle()
    values = asked.values.open("w", encoding="utf8") if asked.values else None
    sheet = Sheet(asked.only, values)
    module = importlib.import_module(f"same_numbers.{PARTS[asked.part][0]}")
    if asked.part == "saved":
        module.part(sheet, save=asked.save, load=asked.load)
    else:
        module.part(sheet)
    asked.out.write_text(json.dumps({"digests": sheet.digests, "texts": sheet.texts}), encoding="utf8")


if __name__ == "__main__":
    main()
