"""Random words after `gradsplit`: it ends with a code and a message, never with a traceback.

`run` would become the script, and the training commands would train: they get words that end at their parsing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import tempfile
from pathlib import Path

from benchmarks.fuzz.draws import name, number
from benchmarks.fuzz.run_files import sound_file
from benchmarks.fuzz.verdict import NotOurs
from gradsplit.cli import COMMANDS, main
from gradsplit.watch.run import launch

__all__ = ["command_lines"]

_OPTIONS = {
    "plan": ("--strategy", "--lines"),
    "report": ("--no-page", "--fail-on", "--html", "--jsonl"),
    "run": ("--watch", "--control", "--plan", "--budget", "--record", "--to", "--max-nodes", "--max-megabytes"),
    "demo": ("--jobs", "--seed", "--quick"),
    "compare": ("--methods", "--lr", "--strengths", "--seeds", "--option"),
    "diagnose": (),
    "ladder": ("--order",),
    "bench": (),
    "watch": (),
}
_WORDS = (
    *("xsp", "tree_sp", "lbf", "gpt", "detection", "train.py", "explosion", "-1", "0", "1", "nope", "a:b", "os:getcwd"),
    *("relative:factor=0.2", "root@fixed:limit=1", "relative:factor=x", "@", ":", "fixed:limit=nan", "jsonl:x.jsonl"),
    *("", "--", "-h", "--help", "--version", "=", "a=b", "=b", "1e-3,x", "json", ":name", "gradsplit:", "os.path:sep"),
)
_TRAINS = ("demo", "compare", "bench", "diagnose", "ladder", "watch")


def command_lines(rng: random.Random) -> str:
    """One command line; the codes of a wrong one are 1 and 2."""
    with _in_folder() as folder:
        words = _words(rng, folder)
        out, err = io.StringIO(), io.StringIO()
        code: object = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _not_launching():
                main(words)
        except SystemExit as end:
            code = end.code
        except Exception as error:
            raise NotOurs(f"{type(error).__name__}: {error} after {words}") from error
    if code not in (0, 1, 2, None) and not isinstance(code, str):
        raise NotOurs(f"code {code} after {words}")
    if "Traceback" in err.getvalue() + out.getvalue():
        raise NotOurs(f"a traceback was printed after {words}")
    if code == 2 and not err.getvalue().strip():
        raise NotOurs(f"no message after {words}")
    return "refused" if code else "ok"


def _words(rng: random.Random, folder: Path) -> list[str]:
    command = rng.choice((*COMMANDS, "plan", "report", "run", "report", name(rng).replace("\0", "")))
    if command == "doctor":
        command = "plan"
    words = [command]
    if command == "report" and rng.random() < 0.6:
        words.append(str(folder / "run.db"))
    for _ in range(rng.randint(0, 4)):
        options = _OPTIONS.get(command, ())
        if options and rng.random() < 0.5:
            words.append(rng.choice(options))
        words.append(rng.choice((*_WORDS, str(number(rng)), name(rng).replace("\0", ""))))
    if command in _TRAINS:
        words.append("--no-such-option")
    if command == "report" and rng.random() < 0.9:
        words.append("--no-page")
    return words


@contextlib.contextmanager
def _in_folder():
    """A working folder of its own with a run file and a script."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "run.db").write_bytes(sound_file())
        (folder / "train.py").write_text("raise SystemExit('started')\n")
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


@contextlib.contextmanager
def _not_launching():
    """`run` parses all it was given, then stops where it would become the script."""

    @functools.wraps(os.execve)
    def stop(*_: object) -> None:
        raise SystemExit(0)

    before = launch.os.execve
    launch.os.execve = stop
    try:
        yield
    finally:
        launch.os.execve = before
