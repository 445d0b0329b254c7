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
        (["demo", "--jobs", "0"], "gradsplit demo --jobs 0: expected a number >= 1"),
        (
            ["demo", "--jobs", "x"],
            "gradsplit demo --jobs x: expected a whole number. `gradsplit demo --help` says more.",
        ),
        (
            ["demo", "--quick", "--out", "/dev/null/x"],
            "gradsplit demo --out /dev/null/x: expected a folder that can be",
        ),
        (["plan", "nothing"], "gradsplit plan nothing: expected MODULE:FUNCTION, for example train:make_model"),
        (["plan", "train.py"], "expected MODULE:FUNCTION, for example train:make_model"),
        (["plan", "lib/train.py:make"], "expected a dotted name of a module, without .py. Write lib.train:make."),
        (["plan", "gpt", "--lines", "-1"], "gradsplit plan --lines -1: expected a number >= 0"),
        (["plan", "no_such_module:x"], "expected a module 'no_such_module' here or installed"),
        (["diagnose"], "gradsplit diagnose: expected either MODULE:FUNCTION or --demo"),
        (["diagnose", "gpt", "--lr", "0"], "gradsplit diagnose --lr 0: expected a finite number > 0"),
        (["diagnose", "gpt", "--lr", "fast"], "gradsplit diagnose --lr fast: expected a number."),
        (["diagnose", "gpt", "--limit", "0"], "gradsplit diagnose --limit 0: expected a number >= 1"),
        (
            ["diagnose", "gpt", "--out", "no/such/f"],
            "--out no/such/f: expected a file that can be written, got no folder",
        ),
        (["diagnose", "gpt", "--page", "/"], "--page /: expected a file that can be written, got a folder"),
        (["ladder", "gpt", "--strategy", "xps"], "gradsplit ladder --strategy xps: expected one of"),
        (["ladder", "gpt", "--count", "0"], "gradsplit ladder --count 0: expected a number >= 1"),
        (["report", "--html", "no/such/f"], "gradsplit report --html no/such/f: expected a file that can be written"),
        (["watch", "--seconds", "-1"], "gradsplit watch --seconds -1: expected a number >= 0.1"),
        (["bench", "--seconds", "0"], "gradsplit bench --seconds 0: expected a number >= 0.1"),
        (
            ["run", "--max-nodes", "1", "x.py"],
            "gradsplit run --max-nodes 1: expected --max-nodes >= 2",
        ),
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
    with pytest.raises(ValueError, match="expected MODULE:FUNCTION"):
        main(["plan", "nothing"])


def test_a_package_that_the_command_line_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "gradsplit.cli.app", raising=False)
    with pytest.raises(SystemExit, match=r"expected the package typer, .*Run: pip install typer rich"):
        main(["--help"])


MODULE = """
import torch
from math import floor
def make(): return torch.nn.Linear(2, 2)
def needs(width): return torch.nn.Linear(width, 2)
def full(): raise RuntimeError("out of memory.")
def number(): return 3
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mkae", "expected a name in own_module, got none. It has make, needs, full, number. Did you mean 'make'?"),
        ("needs", "expected a function without arguments, got one that needs (width)."),
        ("full", "expected a function that returns; it raised RuntimeError: out of memory at "),
        ("number", "got int."),
    ],
)
@pytest.mark.parametrize("command", ["plan", "diagnose", "ladder"])
def test_a_fault_in_the_users_function_is_named_with_its_place(capsys, tmp_path, monkeypatch, command, name, message):
    (tmp_path / "own_module.py").write_text(MODULE, encoding="utf8")
    _from_folder(monkeypatch, tmp_path)
    code, _, err = _main(capsys, command, f"own_module:{name}")
    assert code == 2
    assert err.startswith(f"gradsplit {command} own_module:{name}: ") and message in err
    if name == "full":
        assert f"{tmp_path / 'own_module.py'}:6; GRADSPLIT_DEBUG=1 shows more" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def x(:", "expected a module that can be imported; it raised SyntaxError: "),
        ("import no_such_package", "it raised ModuleNotFoundError: No module named 'no_such_package' at "),
        ("raise SystemExit(3)", "it raised SystemExit: 3 at "),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_place(capsys, tmp_path, monkeypatch, text, message):
    (tmp_path / "own_module.py").write_text(text, encoding="utf8")
    _from_folder(monkeypatch, tmp_path)
    code, _, err = _main(capsys, "plan", "own_module:make")
    assert code == 2
    assert err.startswith("gradsplit plan own_module:make: ") and message in err and "own_module.py:1" in err


def _from_folder(monkeypatch, folder):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    importlib.invalidate_caches()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    from gradsplit.cli.app import write_file

    place = tmp_path / "page.html"
    write_file(place, "before")
    with pytest.raises(UnicodeEncodeError):
        write_file(place, "after \ud800")
    assert place.read_text(encoding="utf8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_an_interruption_ends_with_its_code_and_says_so(capsys, monkeypatch):
    from gradsplit.cli import doctor

    def interrupted(devices):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_checked", interrupted)
    code, _, err = _main(capsys, "doctor")
    assert (code, err) == (130, "\ngradsplit doctor: interrupted.\n")


def test_an_interrupted_comparison_says_what_is_kept(capsys, tmp_path, monkeypatch):
    def interrupted(*words, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradsplit.lab.compare.compare", interrupted)
    code, _, err = _main(capsys, "compare", "gpt", "--jobs", "0", "--out", str(tmp_path))
    assert code == 130
    assert err == (
        f"\ngradsplit compare: interrupted; finished runs are kept in {tmp_path}, and the same command goes on from "
        "there.\n"
    )
