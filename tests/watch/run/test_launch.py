"""The command: what it refuses, and that exit codes, signals, arguments and tracebacks are the script's own."""

from __future__ import annotations

import importlib.util
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from gradsplit.watch.record import RunFile
from gradsplit.watch.run.launch import program_of
from gradsplit.watch.run.settings import VARIABLE, Settings
from tests.watch.run.processes import environment, run_gradsplit, run_python, without_ours

_LIGHT = """
import os, sys
print(sys.argv, __name__, sys.path[0] == os.path.dirname(os.path.abspath(__file__)))
print([name for name in sys.path if os.path.join("gradsplit", "watch") in name], "torch" in sys.modules)
import __main__
print(__main__.__file__, sys.stdin.read())
if sys.argv[1] == "raise":
    raise LookupError("mine")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("word", ["0", "7", "raise"])
def test_a_script_without_torch_cannot_tell(tmp_path, word):
    (tmp_path / "script.py").write_text(_LIGHT)
    alone = run_python(tmp_path, "script.py", word, "--watch", "-x", "two words", PYTHONPATH="")
    under = run_gradsplit(tmp_path, "--watch", "script.py", word, "--watch", "-x", "two words")
    assert under.stdout == alone.stdout
    assert under.returncode == alone.returncode
    assert without_ours(under.stderr) == alone.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_the_users_own_sitecustomize_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('customized')\n")
    (tmp_path / "script.py").write_text("import sitecustomize\nprint(sitecustomize.__file__)\n")
    done = run_gradsplit(
        tmp_path, "script.py", PYTHONPATH=os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    )
    assert done.stdout.splitlines()[-2:] == ["customized", str(tmp_path / "sitecustomize.py")]


_ENDLESS = """
import time, torch
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], 0.1)
for step in range(10**9):
    weight.square().sum().backward()
    optimizer.step()
    time.sleep(0.01)
    if step == 20:
        print("going", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_script_leaves_its_recording(tmp_path, number):
    (tmp_path / "train.py").write_text(_ENDLESS)
    process = subprocess.Popen(
        [sys.executable, "-m", "gradsplit.cli.run", "train.py"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "going\n"
    until = time.monotonic() + 60
    while not _rows(tmp_path / "run.db") and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait() == -number
    process.stdout.close()
    with RunFile(tmp_path / "run.db") as file:
        assert "ended" not in file.meta
        series = file.series(file.streams[0])
    assert series.num_rows > 0
    assert series.step_R.tolist() == list(range(series.num_rows))


def _rows(path):
    if not path.exists():
        return 0
    try:
        with RunFile(path) as file:
            return file.num_rows(0)
    except (RuntimeError, sqlite3.Error):
        return 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch.py"], "expected a script, got no such file"),
        (["nosuch-program"], "expected a script, -m MODULE or a program on PATH"),
        (["--watch", "--control", "x.py"], "expected one of the two"),
        (["--budget", "fixed", "x.py"], "expected --control beside it"),
        (["--control", "--budget", "fixxed", "x.py"], "expected a budget of"),
        (["--control", "--plan", "rows", "x.py"], "expected one of whole, per_tensor"),
        (["--to", "paper:x", "x.py"], "expected NAME:PLACE"),
        (["--max-nodes", "0", "x.py"], "expected --max-nodes >= 2"),
        (["--max-megabytes", "0", "x.py"], "expected --max-megabytes >= 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys, words, message):
    from gradsplit.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sink_whose_package_is_missing_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    from gradsplit.cli import main

    (tmp_path / "x.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--to", "wandb:project", "x.py"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--to wandb:project: expected the package wandb, which is missing. Run: pip install wandb" in said
    assert [path.name for path in tmp_path.iterdir()] == ["x.py"]


def test_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("")
    assert program_of(["x.py", "-a"])[-2:] == ["x.py", "-a"]
    assert program_of(["-m", "json.tool"])[-2:] == ["-m", "json.tool"]
    assert program_of(["python3", "x.py"])[0].endswith("python3")
    with pytest.raises(ValueError, match="got nothing"):
        program_of([])


def test_settings_survive_the_environment():
    settings = Settings(
        record="a b.db", control=True, budget=("fixed:limit=1",), to=("jsonl:x",), about={"argv": ["ü"]}
    )
    assert Settings.from_environment(settings.to_environment()) == settings
    assert Settings.from_environment({VARIABLE: ""}) is None
