"""A run file that SQLite finds whole may hold anything: it is refused by name; nothing hangs or fills memory."""

from __future__ import annotations

import json
import sqlite3
import zlib

import pytest

from benchmarks.fuzz.run_files import read_whole, sound_file
from gradsplit.watch.record import Outline, RunFile, RunFileError


def _changed(folder, statement, *values):
    path = folder / "run.db"
    path.write_bytes(sound_file())
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()
    return path


def test_the_file_itself_is_read(tmp_path):
    (tmp_path / "run.db").write_bytes(sound_file())
    read_whole(tmp_path / "run.db", with_page=True)
    with RunFile(tmp_path / "run.db") as file:
        assert file.series(file.streams[0]).num_rows == 80


@pytest.mark.parametrize(
    ("statement", "value", "words"),
    [
        ("UPDATE meta SET value = ? WHERE key = 'argv'", "{", "Expecting property name"),
        ("UPDATE meta SET value = ? WHERE key = 'argv'", "7", "list of words in meta 'argv'"),
        ("UPDATE meta SET value = ? WHERE key = 'started'", "1e300", "seconds since the epoch"),
        ("UPDATE meta SET value = replace(value, '2.0', ?) WHERE key = 'guard'", '"2"', "float in 'usual'"),
        ("UPDATE meta SET value = replace(value, '[]', ?) WHERE key = 'guard'", "[3]", "in 'worst'"),
        ("UPDATE stream SET about = ?", "[]", "a mapping about the stream"),
        ("UPDATE stream SET about = ?", '{"words": 3}', "a list of words"),
        ("UPDATE stream SET about = ?", '{"words": ["relative:factor=<b>"]}', "a list of words"),
        ("UPDATE stream SET about = ?", '{"num_bins": []}', "a count in 'num_bins'"),
        ("UPDATE stream SET outline = ?", "null", "expected an outline with names"),
        ("UPDATE chunk SET num_rows = ?", 1 << 40, "a chunk of some rows"),
        ("UPDATE chunk SET first_row = ? WHERE first_row = 0", "x", "a chunk of some rows"),
        ("UPDATE chunk SET loss = ?", b"123", "bytes of 'loss'"),
        ("UPDATE chunk SET norm = ?", "text", "bytes of 'norm'"),
        ("UPDATE chunk SET norm = ?", b"no deflated bytes", "decompressing"),
        ("UPDATE chunk SET norm = ?", zlib.compress(b"short"), "bytes after inflating, got 5"),
        ("UPDATE chunk SET norm = ?", zlib.compress(bytes(10**8)), "bytes after inflating, got more"),
        ("UPDATE chunk SET zeroed = ?", zlib.compress(bytes(7)), "bytes after inflating, got 7"),
        ("UPDATE chunk SET starts = ?", bytes(24), "windows that begin one after the other"),
        ("UPDATE event SET step = ?", "x", "invalid literal"),
        ("UPDATE stream SET id = ?", 5, None),
    ],
)
def test_a_wrong_value_is_named(tmp_path, statement, value, words):
    path = _changed(tmp_path, statement, value)
    if words is None:  # the chunks belong to no stream: nothing recorded
        words = "at least one recorded step"
    with pytest.raises(RunFileError, match=rf"run file .*run.db: expected.*{words}"):
        read_whole(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parents": [0, 0]}, "a tree: every node after its parent"),
        ({"parents": [-1, 1]}, "a tree"),  # a node above itself: looking for the root would never end
        ({"parents": [-1, -1]}, "a tree"),
        ({"parents": [-1, "0"]}, "a list of int in 'parents'"),
        ({"names": ["all"]}, "one level and one parent per node"),
        ({"levels": ["root", "branch"]}, "levels of root, module"),
        ({"nodes_of_leaves": [2]}, "a node of its own"),
        ({"nodes_of_leaves": []}, "a leaf, and one level"),
        ({"tensors_of_leaves": []}, "one tensor, size and count per leaf"),
        ({"numel": [float("nan")]}, "sizes and counts"),
        ({"bins": [True]}, "a list of int in 'bins'"),
    ],
)
def test_an_outline_that_is_no_tree_is_refused(change, words):
    sound = {
        "names": ["all", "w"], "levels": ["root", "tensor"], "parents": [-1, 0], "nodes_of_leaves": [1],
        "tensors_of_leaves": ["w"], "numel": [4.0], "bins": [1],
    }  # fmt: skip
    assert Outline.from_dict(json.loads(json.dumps(sound))).num_leaves == 1
    with pytest.raises(ValueError, match=words):
        Outline.from_dict({**sound, **change})
    with pytest.raises(ValueError, match="expected an outline"):
        Outline.from_dict({key: value for key, value in sound.items() if key not in change})


def test_a_refused_file_is_closed(tmp_path):
    path = _changed(tmp_path, "UPDATE meta SET value = '{'")
    with pytest.raises(RunFileError):
        RunFile(path)
    path.unlink()  # where open files cannot be deleted this would fail
    assert not path.exists()
