"""Coverage-guided fuzzing of the readers of run files and checkpoints with atheris (libFuzzer), from sound files.

    pip install atheris==3.0.0                                         # CPython 3.11 to 3.13 on Linux; no dependency
    OMP_NUM_THREADS=1 python benchmarks/fuzz_coverage.py run-file -runs=20000
    OMP_NUM_THREADS=1 python benchmarks/fuzz_coverage.py run-file-values -runs=20000
    OMP_NUM_THREADS=1 python benchmarks/fuzz_coverage.py checkpoint -runs=20000

Options after the target are libFuzzer's. An input that ends in anything but an answer or an error of ours is a crash;
it is kept as a file, and libFuzzer runs it again when its name is given.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import atheris

with atheris.instrument_imports(include=["gradsplit.watch.record", "gradsplit.resume", "gradsplit.watch.report"]):
    from benchmarks.fuzz.checkpoints import FORMATS, sound_checkpoint
    from benchmarks.fuzz.run_files import read_whole, sound_file
    from benchmarks.fuzz.verdict import outcome
    from gradsplit.resume.checkpoint import read_tree

FOLDER = tempfile.TemporaryDirectory()
PLACE = Path(FOLDER.name) / "input"


def run_file(data: bytes) -> None:
    """The bytes are a run file."""
    PLACE.write_bytes(data)
    outcome(lambda: read_whole(PLACE), what=f"{len(data)} bytes")


def run_file_values(data: bytes) -> None:
    """The bytes are an outline, what a stream is about, and a chunk's blobs, in an otherwise sound file."""
    given = atheris.FuzzedDataProvider(data)
    PLACE.write_bytes(sound_file())
    connection = sqlite3.connect(PLACE)
    for column in ("outline", "about"):
        if given.ConsumeBool():
            text = given.ConsumeUnicodeNoSurrogates(given.ConsumeIntInRange(0, 400))
            connection.execute(f"UPDATE stream SET {column} = ?", (text,))
    for column in ("starts", "step", "loss", "norm", "peak", "kept", "zeroed"):
        if given.ConsumeBool():
            blob = given.ConsumeBytes(given.ConsumeIntInRange(0, 700))
            connection.execute(f"UPDATE chunk SET {column} = ? WHERE first_row = 0", (blob,))
    if given.ConsumeBool():
        connection.execute("UPDATE chunk SET num_rows = ? WHERE first_row = 0", (given.ConsumeInt(8),))
    connection.commit()
    connection.close()
    outcome(lambda: read_whole(PLACE), what="values")


def checkpoint(data: bytes) -> None:
    """The bytes are a checkpoint."""
    PLACE.write_bytes(data)
    outcome(lambda: read_tree(PLACE), what=f"{len(data)} bytes")


TARGETS = {"run-file": run_file, "run-file-values": run_file_values, "checkpoint": checkpoint}


def main() -> None:
    """Fuzz one target, starting from sound files."""
    name, options = sys.argv[1], sys.argv[2:]
    corpus = Path(FOLDER.name) / "corpus"
    corpus.mkdir()
    if name == "run-file":
        (corpus / "sound").write_bytes(sound_file())
    if name == "checkpoint":
        for each in FORMATS:
            (corpus / each).write_bytes(sound_checkpoint(each))
    atheris.Setup([sys.argv[0], "-max_len=40000", "-timeout=20", *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
