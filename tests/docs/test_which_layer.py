"""The script of docs/which-layer.md, recorded and reported by the commands that stand below it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.architecture.sources import ROOT
from tests.docs.markdown import blocks_of


def _gradsplit(words, folder):
    return subprocess.run(
        [sys.executable, "-m", "gradsplit", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_the_report_says_what_the_page_shows(tmp_path):
    blocks = blocks_of(ROOT / "docs/which-layer.md")
    script, commands, shown = blocks[:3]
    assert [block.language for block in blocks[:3]] == ["python", "bash", "text"]
    (tmp_path / "train.py").write_text(script.text, encoding="utf8")
    printed = [_gradsplit(line.split()[1:], tmp_path) for line in commands.text.splitlines()]
    first, *others = shown.text.splitlines()
    assert first.partition(": norm")[0] in printed[-1], printed[-1]
    for line in others:
        assert line in printed[-1], printed[-1]
    assert (tmp_path / "run.html").is_file()
