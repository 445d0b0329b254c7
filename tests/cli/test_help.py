"""Every help begins with a sentence and an example, fits its terminal, and gives each option a unit and its default."""

from __future__ import annotations

import importlib
import re

import pytest
import typer

from gradsplit.cli import COMMANDS, main
from gradsplit.cli.app import _Command

TYPES = re.compile(r"<\w|\b(list|tuple)\[|\bint\b|\bfloat\b|\bstr\b|<path>")


def _help(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


def _params(name):
    """The parameters of a command, as typer reads them."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=_Command)(importlib.import_module(f"gradsplit.cli.{COMMANDS[name][0]}").run)
    return [param for param in typer.main.get_command(app).params if param.name != "help"]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_a_help_fits_its_terminal(capsys, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = _help(capsys, *name.split()).splitlines()
    assert max(map(len, lines)) <= min(width, 80), max(lines, key=len)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_a_help_begins_with_a_sentence_and_an_example(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    first, example, usage, *_ = _help(capsys, *name.split()).split("\n\n")
    assert first.count(". ") == 0 and first.endswith(".")
    assert re.fullmatch(rf"Example: gradsplit {name or 'run'}\b.*", example), "one line, to be copied"
    assert usage.startswith(f"Usage: gradsplit {name}".rstrip())


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_says_its_unit_its_meaning_and_its_default(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    shown = _help(capsys, name)
    assert not TYPES.search(shown), TYPES.search(shown)
    words = " ".join(shown.split())
    for param in _params(name):
        assert " ".join(param.help.split()) in words
        if param.param_type_name == "option" and not param.is_flag:
            assert f"{param.opts[0]} {param.metavar} " in words
            assert param.multiple or f"{' '.join(param.help.split())} [default: " in words, param.opts
        elif param.param_type_name == "argument":
            assert param.metavar == param.metavar.upper() and f" {param.metavar} " in words


def test_options_of_long_commands_stand_in_groups():
    for name in COMMANDS:
        options = [param for param in _params(name) if param.param_type_name == "option"]
        if len(options) > 6:
            assert all(param.rich_help_panel for param in options), name


@pytest.mark.parametrize("text", ["--lr <str>", "--to <list[str]>", "file int"])
def test_a_type_of_python_in_a_help_is_noticed(text):
    assert TYPES.search(text)


def test_an_argument_that_is_missing_is_called_as_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Usage: gradsplit compare [OPTIONS] WORKLOAD\n" in error and "'WORKLOAD'" in error
