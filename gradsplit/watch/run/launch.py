"""Replacing this process by the script, in a fresh interpreter that attaches by itself.

The script gets an interpreter as if it had been started by hand: its own ``__main__``, arguments, path, signals, exit
code and tracebacks. The same way reaches the workers of a launcher (docs/decisions/0009-a-fresh-interpreter.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .ending import say
from .settings import Settings

__all__ = ["free_name", "launch", "program_of"]


def free_name(path: str | os.PathLike[str]) -> Path:
    """Return the path itself, or ``name-2.db``, ``name-3.db``, … whichever does not exist yet."""
    place = Path(path)
    for number in itertools.count(2):
        try:
            there = place.exists()
        except OSError:  # a folder that may not be looked into: whoever writes there will say so
            there = False
        if not there:
            return place
        place = Path(path).with_stem(f"{Path(path).stem}-{number}")
    raise AssertionError("count() never ends")


SITE = Path(__file__).resolve().parent / "site"


def program_of(words: Sequence[str]) -> list[str]:
    """Return the program and arguments that run a script, a module (``-m name``) or a launcher found on PATH.

    Raises:
        ValueError: nothing to run, or nothing of that name.
    """
    if not words or words == ["-m"]:
        raise ValueError("gradsplit run: expected a script, -m MODULE or a launcher, got nothing. Name what to run.")
    first = words[0]
    python = [sys.executable, *_interpreter_flags()]
    if first == "-m" or first.endswith(".py") or Path(first).is_dir():
        if first != "-m" and not Path(first).exists():
            raise ValueError(f"gradsplit run {first}: expected a script, got no such file in {os.getcwd()}.")
        return [*python, *words]
    beside = Path(sys.executable).with_name(first)  # torchrun of this environment, activated or not
    program = str(beside) if beside.is_file() and os.sep not in first else shutil.which(first)
    if program is not None:
        return [program, *words[1:]]
    if Path(first).is_file():
        return [*python, *words]
    raise ValueError(f"gradsplit run {first}: expected a script, -m MODULE or a program on PATH, got none of these.")


def launch(words: Sequence[str], settings: Settings) -> NoReturn:
    """Become the script.

    Raises:
        ValueError: nothing of that name to run.
    """
    command = program_of(words)
    place = Path(settings.record)
    with contextlib.suppress(OSError):  # the script runs in any case, and says then that nothing is recorded
        place.parent.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(
        settings, record=str(free_name(place).resolve()), pid=os.getpid(), about={**about(words), **settings.about}
    )
    deaf = _leaves_us_out(command)
    if deaf and (settings.fail_on or settings.guard or settings.control):
        raise ValueError(
            f"gradsplit run … {deaf}: expected a Python that reads PYTHONPATH, which attaches to the script, got one "
            "that does not. Leave this option out."
        )
    if deaf:
        say(f"nothing will be recorded: {deaf} tells Python not to read PYTHONPATH, which attaches to the script")
    # The script may change its folder before it trains.
    at_home = [word.partition(":") for word in settings.to]
    to = (f"{n}:{Path(p).resolve()}" if n in ("jsonl", "tensorboard") else f"{n}:{p}" for n, _, p in at_home)
    settings = dataclasses.replace(settings, to=tuple(to))
    environment = {**os.environ, **settings.to_environment()}
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # Windows cannot replace a process: the parent would return at once
        sys.exit(subprocess.call(command, env=environment))
    os.execve(command[0], command, environment)


def _leaves_us_out(command: Sequence[str]) -> str:
    """Return the option of Python by which it would not run our sitecustomize; empty if there is none.

    >>> _leaves_us_out(["/bin/python3", "-u", "-Wignore", "-IB", "x.py"]), _leaves_us_out(["python", "x.py", "-I"])
    ('-IB', '')
    """
    words = iter(command[1:] if "python" in Path(command[0]).name else ())
    for word in words:
        if not word.startswith("-") or word in ("-", "-m", "-c"):
            break
        if word in ("-W", "-X"):
            next(words, None)
        elif word[:2] not in ("--", "-W", "-X") and set(word) & set("IES"):
            return word
    return ""


def about(words: Sequence[str]) -> dict[str, Any]:
    """Return what a reader of the run file will want to know about how it came to be."""
    from ... import __version__

    script = next((Path(word) for word in words if word.endswith(".py") and Path(word).is_file()), None)
    folder = script.resolve().parent if script else Path.cwd()
    return {
        "argv": list(words),
        "folder": str(Path.cwd()),
        "gradsplit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "launched": time.time(),
        **_git(folder),
    }


def _git(folder: Path) -> dict[str, Any]:
    """Return the commit of the user's repository and whether files differ from it, if there is one."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=2, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"git_commit": commit, "git_changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}


def _interpreter_flags() -> list[str]:
    """Return the flags this interpreter was given (-O, -W, -X, -u …), for the script's own."""
    flags: list[str] = getattr(subprocess, "_args_from_interpreter_flags", list)()
    return [*flags, "-u"] if os.environ.get("PYTHONUNBUFFERED") else list(flags)
