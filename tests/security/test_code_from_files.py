"""Nothing read from a file, a name or a command line is ever run: no pickle, no eval, no shell; and no network."""

from __future__ import annotations

import ast
import pickle
import sqlite3

import pytest
import torch

import gradsplit as gs
from benchmarks.fuzz.run_files import sound_file
from gradsplit.resume.formats import write_torch
from tests.architecture.sources import package_files, relative

# Modules that make objects, and so run code, from bytes.
MAKE_OBJECTS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
RUN_TEXT = {"eval", "exec", "compile"}
# What talks to other machines; torch.distributed and the sinks that a user names do so in libraries of their own.
NETWORK = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "urllib3",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "websockets",
}
# What starts another process there, and with what: fixed words, or what the user has asked to be run. Never a shell.
STARTS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}


# The one text that is run is made by the package itself, from budgets' operations; `only_arithmetic` reads it before.
MADE_HERE = {"gradsplit/kernels/triton_decide.py": ["exec(…)", "compile(…)"]}


def findings(source: str) -> list[str]:
    """What in a source could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: import {n}" for n in names if n.partition(".")[0] in MAKE_OBJECTS | NETWORK]
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in RUN_TEXT or called in STARTS or called.partition(".")[0] in MAKE_OBJECTS:
            found.append(f"line {node.lineno}: {called}(…)")
        if called.endswith("torch.load") and given.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load(…) without weights_only=True")
        if called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {called}(allow_pickle=…)")
        if called.endswith("yaml.load") or given.get("shell", "False") != "False":
            found.append(f"line {node.lineno}: {called}(…)")
    return found


@pytest.mark.parametrize("path", package_files(), ids=relative)
def test_the_package_runs_nothing_that_it_reads(path):
    found = findings(path.read_text(encoding="utf8"))
    allowed = MADE_HERE.get(str(relative(path)), [])
    assert [said.partition(": ")[2] for said in found] == allowed, f"{relative(path)}: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "def f(x):\n    tl.store(x, open('a'))",
        "def f(x):\n    tl.__class__",
        "def f(x):\n    y = x.__globals__",
        "def f(x):\n    y = [a for a in x]",
        "def f(x):\n    y = (lambda: 1)()",
        "def f(x):\n    y = tl.sum(eval('1'))",
        "x[0]",
    ],
)
def test_a_program_that_does_more_than_arithmetic_is_not_run(text):
    triton_decide = pytest.importorskip("gradsplit.kernels.triton_decide", reason="needs the package triton")
    with pytest.raises(ValueError, match="expected arithmetic alone"):
        triton_decide.only_arithmetic(ast.parse(text))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "eval(text)",
        "exec(compile(text, 'a', 'exec'))",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import subprocess\nsubprocess.run(words, shell=True)",
        "import os\nos.system(word)",
        "import joblib\njoblib.load(path)",
        "import urllib.request",
        "from socket import socket",
    ],
)
def test_each_way_to_run_a_file_is_found(source):
    assert findings(source)


@pytest.mark.parametrize(
    "source", ["torch.load(path, weights_only=True)", "model.eval()", "re.compile(text)", "json.loads(text)"]
)
def test_what_only_reads_is_not_taken_for_it(source):
    assert findings(source) == []


def test_a_run_file_holds_no_pickle(tmp_path):
    """Every pickle since protocol 2 begins with byte 0x80 and its protocol, and ends with a full stop."""
    (tmp_path / "run.db").write_bytes(sound_file())
    connection = sqlite3.connect(tmp_path / "run.db")
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    values = [value for table in tables for row in connection.execute(f"SELECT * FROM {table}") for value in row]
    connection.close()
    blobs = [value for value in values if isinstance(value, bytes)]
    assert len(blobs) > 10
    assert not [blob for blob in blobs if blob[:1] == b"\x80" and blob[1:2] <= b"\x05" and blob[-1:] == b"."]


def test_a_checkpoint_with_code_inside_is_refused_and_its_code_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"gradsplit": 1, "parts": Evil()}, tmp_path / "foreign.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Evil()))
    with (tmp_path / "checksummed.ckpt").open("w+b") as file:
        write_torch(file, {"gradsplit": 1, "parts": Evil()})  # its checksum is right
    for name, words in (("foreign", "the checksum"), ("bare", "the checksum"), ("checksummed", "plain tensors")):
        with pytest.raises(gs.CheckpointError, match=rf"load_checkpoint\(.*{name}.*\): expected .*{words}"):
            gs.load_checkpoint(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "owned").exists()
    pickle.loads((tmp_path / "bare.ckpt").read_bytes()).close()
    assert (tmp_path / "owned").exists(), "the code would have run"
