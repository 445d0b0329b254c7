"""The code in the documentation runs as printed, and prints what is printed beside it."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.architecture.sources import ROOT, relative
from tests.docs.markdown import blocks_of, pages, prose_of

# The history may show what is gone; the twin's blocks are those of README.md (test_readme_pair.py).
_LEFT_OUT = {"CHANGELOG.md", "README.zh-CN.md"}
_PAGES = [page for page in pages() if page.name not in _LEFT_OUT]
_MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf8")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _blocks(*languages):
    return [
        pytest.param(page, number, id=f"{relative(page)}:{block.line}")
        for page in _PAGES
        for number, block in enumerate(blocks_of(page))
        if block.language in languages
    ]


def _run(code: str, name: str, namespace: dict) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), namespace)
    return printed.getvalue()


@pytest.mark.parametrize(("page", "number"), _blocks("python"))
def test_a_python_block_runs_and_prints_what_the_text_block_after_it_says(page, number, tmp_path, monkeypatch):
    blocks = blocks_of(page)
    monkeypatch.chdir(tmp_path)
    printed = _run(blocks[number].text, f"{relative(page)}:{blocks[number].line}", {"__name__": "__main__"})
    after = blocks[number + 1 : number + 2]
    if printed:
        assert after and after[0].language == "text", (
            f"{relative(page)}: the block prints, the page does not:\n{printed}"
        )
        assert doctest.OutputChecker().check_output(after[0].text, printed, _FLAGS), printed


def _user_script() -> dict:
    """What a training script has defined before the lines that a diff of the README shows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    batches = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(4)]
    return {
        "__name__": "__main__",
        "torch": torch,
        "model": model,
        "batches": batches,
        "loss_fn": torch.nn.functional.cross_entropy,
    }


def _sides(diff: str) -> tuple[str, str]:
    """The code before and after."""
    lines = diff.splitlines()
    before = "\n".join(line[2:] for line in lines if not line.startswith("+"))
    return before, "\n".join(line[2:] for line in lines if not line.startswith("-"))


@pytest.mark.parametrize(("page", "number"), _blocks("diff"))
def test_both_sides_of_a_diff_are_code(page, number):
    for code in _sides(blocks_of(page)[number].text):
        assert compile(code, relative(page), "exec"), code


def test_the_diff_of_the_readme_trains_before_and_after():
    (diff,) = [block for block in blocks_of(ROOT / "README.md") if block.language == "diff"]
    for code in _sides(diff.text):
        script = _user_script()
        start = [p.detach().clone() for p in script["model"].parameters()]
        _run(code, "README.md", script)
        moved = [not torch.equal(a, b) for a, b in zip(start, script["model"].parameters(), strict=True)]
        assert all(moved), "the script leaves some parameters where they were"


def test_the_readme_asks_for_three_lines():
    diffs = [block for block in blocks_of(ROOT / "README.md") if block.language == "diff"]
    assert diffs, "README.md shows no diff"
    changed = [line for line in diffs[0].text.splitlines() if line[:1] in "+-"]
    assert len(changed) == 3
    assert all(line.startswith("+") for line in changed)


def _commands() -> list[tuple[str, ...]]:
    """Every `make …` and `gradsplit …` command of the documentation and the Makefile, once."""
    lines = []
    for page in _PAGES:
        shell = [block.text for block in blocks_of(page) if block.language in {"bash", "sh", "console"}]
        lines += "".join(shell).splitlines() + re.findall(r"`([^`\n]+)`", prose_of(page))
    lines += re.findall(r"^\t\$\(BIN\)/(gradsplit .*?)(?: \$\(ARGS\))?$", _MAKEFILE, re.MULTILINE)
    words = [tuple(re.sub(r"\s#.*$", "", line).removeprefix("$ ").split()) for line in lines]
    return sorted({w for w in words if len(w) > 1 and w[0].rpartition("/")[2] in {"make", "gradsplit"}})


@pytest.mark.parametrize("command", [c for c in _commands() if c[0] == "make"], ids=" ".join)
def test_a_make_target_that_is_named_exists(command):
    targets = set(re.findall(r"^([a-z-]+):", _MAKEFILE, re.MULTILINE))
    named = {word for word in command[1:] if "=" not in word}
    assert named <= targets, f"{' '.join(command)}: the Makefile has no {sorted(named - targets)}"


@pytest.mark.parametrize("command", [c for c in _commands() if c[0] != "make"], ids=" ".join)
def test_a_gradsplit_command_that_is_named_exists_with_its_options(command):
    verb = [word for word in command[1:2] if not word.startswith("-")]
    done = subprocess.run(
        [sys.executable, "-c", "from gradsplit.cli import main; main()", *verb, "--help"],
        cwd=ROOT, env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    options = {word.partition("=")[0] for word in command if word.startswith("--")}
    unknown = {option for option in options if option not in done.stdout}
    assert not unknown, f"{' '.join(command)}: no option {sorted(unknown)}"
