"""A name from a file cannot move the cursor, recolour or retitle the terminal in which it is shown."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from gradsplit.cli import main
from gradsplit.cli.watch import view
from gradsplit.watch.record import RunFile, Stream
from tests.watch.record.recorded import noise, outline, write_run

EVIL = "w\x1b]0;owned\x07\x1b[2J\x9b31m\rgone\u202eleft"


@pytest.fixture
def run_file(tmp_path):
    stream = Stream(0, f"Adam{EVIL}", outline({f"m.{EVIL}.w": (4, 2), "head": (2, 2)}))
    return write_run(tmp_path / "run.db", noise(60, stream.outline.num_leaves), stream=stream, git_commit=EVIL)


def _obeyed(text: str) -> list[str]:
    return re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_what_a_terminal_obeys_is_found():
    assert len(_obeyed(EVIL)) == 6 and not _obeyed("plain\ntext")


def test_the_report_shows_it_as_a_mark(run_file, capsys):
    main_words = ["report", str(run_file), "--no-page"]
    with pytest.raises(SystemExit) as end:
        main(main_words)
    assert not end.value.code
    out = capsys.readouterr().out
    assert "�" in out and not _obeyed(out)


def test_the_picture_of_a_running_run_does_too(run_file):
    buffer = io.StringIO()
    with RunFile(run_file) as opened:
        Console(file=buffer, width=200, color_system=None).print(view(opened))
    assert "�" in buffer.getvalue() and not _obeyed(buffer.getvalue())


def test_the_lines_of_json_escape_it(run_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(run_file), "--no-page", "--jsonl", str(tmp_path / "out.jsonl")])
    capsys.readouterr()
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf8").splitlines()
    assert len(lines) == 60 and all(json.loads(line) for line in lines)
    assert not _obeyed("".join(lines))
