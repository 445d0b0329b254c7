"""The table of commands, and errors that teach."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from gradsplit.cli import COMMANDS, main
from tests.architecture.sources import ROOT


def _main(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


def test_the_list_of_commands_is_the_table(capsys):
    code, out, _ = _main(capsys, "--help")
    assert code == 0
    for name, (_, summary) in COMMANDS.items():
        assert name in out and summary[:30] in out


def test_the_list_does_not_wait_for_torch():
    program = (
        "import sys\nfrom gradsplit.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False"), done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_function_with_an_example(name):
    module, summary = COMMANDS[name]
    run = importlib.import_module(f"gradsplit.cli.{module}").run
    assert f"Example: gradsplit {name}" in run.__doc__
    assert summary.endswith(".") and len(summary) <= 60, "longer lines are cut in the list"


def test_the_version(capsys):
    import gradsplit

    assert _main(capsys, "--version")[:2] == (0, f"gradsplit {gradsplit.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compar"], "Did you mean 'compare'?"),
        (["compare", "gpd"], "gradsplit: workload('gpd'): expected one of"),
        (["compare", "gpt", "--methods", "clipp"], "Did you mean 'clip'?"),
        (
            ["compare", "gpt", "--strategies", "rows"],
            "expected some of whole, per_tensor, xsp, lbf, tree_sp, got 'rows'",
        ),
        (["compare", "gpt", "--lr", "a"], "gradsplit: --lr a: expected numbers separated by commas"),
        (["compare", "gpt", "--option", "batch"], "gradsplit: --option batch: expected key=value"),
        (["compare", "gpt", "--optimizer", "rms"], "Settings(optimizer='rms'): expected one of 'sgd'"),
        (["demo", "--jobs", "0"], "gradsplit: --jobs 0: expected at least one worker process"),
        (["plan", "nothing"], "expected module:factory, for example train:make_model"),
        (["plan", "no_such_module:x"], "expected a module 'no_such_module' here or installed"),
        (["plan", "math:tau"], "expected a model or a mapping {name: shape}, got float"),
        (["plan", "torch.nn:Linea"], "expected a name in torch.nn, got none. It has "),
        (["plan", "gpt", "--strategy", "xps"], "Did you mean 'xsp'?"),
    ],
)
def test_a_wrong_argument_says_what_would_be_right(capsys, arguments, message):
    code, _, err = _main(capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.split())


def test_where_an_error_arose_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("GRADSPLIT_DEBUG", "1")
    with pytest.raises(ValueError, match="expected module:factory"):
        main(["plan", "nothing"])


def test_a_package_that_the_command_line_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "gradsplit.cli.app", raising=False)
    with pytest.raises(SystemExit, match=r"expected the package typer, .*Run: pip install typer rich"):
        main(["--help"])
