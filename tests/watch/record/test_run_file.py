"""What is written is read back; a killed writer, a reader beside the writer, a full disk and wrong files do no harm."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from gradsplit.watch.record import RunFile, RunFileError, RunWriter, Stream
from gradsplit.watch.record.run_file import VERSION
from tests.architecture.sources import ROOT
from tests.watch.record.recorded import noise, outline, rows_of, write_run


def _series(path):
    with RunFile(path) as file:
        return file.series(file.streams[0])


def test_rows_come_back(tmp_path):
    norm = noise(120, outline().num_leaves)
    series = _series(write_run(tmp_path / "run.db", norm, flush=7))
    assert series.num_rows == 120
    assert series.step_R.tolist() == list(range(120))
    np.testing.assert_allclose(series.norm(), norm, rtol=2**-8)
    np.testing.assert_allclose(series.total_R, np.sqrt((norm**2).sum(1)), rtol=1e-5)
    assert series.lr_R[3] == pytest.approx(0.1)


def test_a_finished_run_is_one_file(tmp_path):
    write_run(tmp_path / "run.db", noise(20, outline().num_leaves))
    assert [path.name for path in tmp_path.iterdir()] == ["run.db"]


def test_control_is_kept_beside_the_norms(tmp_path):
    stream = Stream(0, "SGD", outline(), controlled=True)
    norm = noise(10, outline().num_leaves)
    kept = np.full_like(norm, 0.25)
    scaled, zeroed = np.ones_like(norm, dtype=int), np.zeros_like(norm, dtype=int)
    zeroed[4, 2] = 3
    norm[4, 2] = np.nan
    with pytest.MonkeyPatch.context():
        writer = RunWriter(tmp_path / "run.db")
        writer.write([rows_of(stream, norm, kept_SL=kept, scaled_SL=scaled, zeroed_SL=zeroed)])
        writer.close()
    series = _series(tmp_path / "run.db")
    assert (series.kept() == 0.25).all()
    assert series.scaled_WL.sum() == norm.size
    assert series.zeroed_WL[4, 2] == 3
    with RunFile(tmp_path / "run.db") as file:
        assert [(event.step, event.leaf, event.kind, event.num) for event in file.events()] == [(4, 2, "zeroed", 3)]


def test_only_the_last_rows_are_read_when_asked(tmp_path):
    path = write_run(tmp_path / "run.db", noise(100, outline().num_leaves), flush=10)
    with RunFile(path) as file:
        series = file.series(file.streams[0], last=25)
    assert series.step_R.tolist() == list(range(70, 100))
    assert series.first_row == 70


def test_a_reader_sees_whole_flushes_while_the_file_is_written(tmp_path):
    stream, norm = Stream(0, "SGD", outline()), noise(30, outline().num_leaves)
    writer = RunWriter(tmp_path / "run.db")
    with RunFile(tmp_path / "run.db") as file:
        assert file.streams == []
        for first in range(0, 30, 10):
            writer.write([rows_of(stream, norm[first : first + 10], first_step=first)])
            assert file.num_rows(0) == first + 10
    writer.close()


_ENDLESS = """
import sys
from pathlib import Path
from gradsplit.watch.record import RunWriter, Stream
from tests.watch.record.recorded import noise, outline, rows_of
writer, stream, first = RunWriter(Path(sys.argv[1])), Stream(0, "SGD", outline()), 0
norm = noise(20, outline().num_leaves)
while True:
    writer.write([rows_of(stream, norm, first_step=first)])
    first += 20
    if first == 200:
        print("going", flush=True)
"""


@pytest.mark.parametrize("wait", [0.0, 0.05])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, wait):
    path = tmp_path / "run.db"
    writer = subprocess.Popen([sys.executable, "-c", _ENDLESS, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "going\n"
    time.sleep(wait)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    series = _series(path)
    assert series.num_rows >= 200
    assert series.num_rows % 20 == 0, "a flush is there as a whole, or not at all"
    assert series.step_R.tolist() == list(range(series.num_rows))
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_full_disk_ends_the_recording_and_not_the_training(tmp_path):
    stream, norm = Stream(0, "SGD", outline()), noise(50, outline().num_leaves)
    writer = RunWriter(tmp_path / "run.db")
    writer.write([rows_of(stream, norm)])
    pages = writer._connection.execute("PRAGMA page_count").fetchone()[0]
    writer._connection.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite meets on a full disk
    with pytest.warns(RuntimeWarning, match=r"stopped, the training goes on.*full") as seen:
        for first in range(50, 500, 50):
            writer.write([rows_of(stream, norm, first_step=first)])
    assert len(seen) == 1
    writer.close()
    assert _series(tmp_path / "run.db").num_rows >= 50


def test_nothing_is_overwritten(tmp_path):
    write_run(tmp_path / "run.db", noise(5, outline().num_leaves))
    with pytest.raises(RunFileError, match="none is overwritten"):
        RunWriter(tmp_path / "run.db")


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_that_cannot_be_written_to(tmp_path, missing):
    folder = tmp_path / "folder"
    if not missing:
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):  # the superuser may write anywhere
            folder = folder / "none"
    with pytest.raises(RunFileError, match="expected a place that can be written to"):
        RunWriter(folder / "run.db")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a file, got none"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"\1" * 5000), "written by gradsplit run"),
        (lambda path: path.write_text("loss,step\n" * 500), "written by gradsplit run"),
        (lambda path: _other_database(path), "another SQLite file"),
        (lambda path: _other_version(path), f"expected version {VERSION}, got version 99. Install a newer"),
    ],
    ids=["missing", "empty", "broken", "text", "another database", "another version"],
)
def test_a_wrong_file_is_refused_in_words(tmp_path, make, message):
    make(tmp_path / "run.db")
    with pytest.raises(RunFileError, match=message):
        RunFile(tmp_path / "run.db")


def _other_database(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.close()


def _other_version(path):
    write_run(path, noise(3, outline().num_leaves))
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def test_a_damaged_page_is_named(tmp_path):
    path = write_run(tmp_path / "run.db", noise(400, outline().num_leaves), flush=5)
    data = bytearray(path.read_bytes())
    data[4096 : len(data) - 4096] = b"\xff" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(RunFileError, match="expected"), RunFile(path) as file:
        file.series(file.streams[0])


def test_a_file_in_a_read_only_folder_is_read(tmp_path):
    path = write_run(tmp_path / "run.db", noise(20, outline().num_leaves))
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        assert _series(path).num_rows == 20
    finally:
        tmp_path.chmod(0o700)
