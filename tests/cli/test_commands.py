"""Each command prints what it promises, and its pages need no network."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch

import gradsplit as gs
from gradsplit.cli import main
from gradsplit.lab.demo import COMPOSED, PHOTOGRAPHS, TEXT, scenes
from gradsplit.lab.methods import METHODS
from gradsplit.lab.registry import REGISTRY
from gradsplit.watch.record import Recorder, RunWriter


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


def _run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


def _loads_from_elsewhere(page: str) -> list[str]:
    """Scripts, styles and pictures that the page itself (not plotly's own text) asks a server for."""
    own = re.sub(r"<script\b.*?</script>", lambda m: m[0][: m[0].index(">") + 1], page, flags=re.DOTALL)
    return re.findall(r"""(?:src|href)=["']?(?:https?:)?//[^"'\s>]+|url\(\s*["']?https?:|@import""", own)


def test_compare_prints_both_tables_and_writes_a_page(capsys, tmp_path):
    _run(
        "compare", "plain-stack", "--methods", "none,clip,default", "--strategies", "tree_sp", "--lr", "0.01,0.1",
        "--strengths", "0.1", "--seeds", "1", "--steps", "4", "--option", "depth=2", "--option", "channels=2",
        "--jobs", "0", "--out", str(tmp_path),
    )  # fmt: skip
    out = capsys.readouterr().out
    for name in ("none", "clip", "default", "tree_sp", "tree_sp-relative"):
        assert out.count(f"\n {name} ") == 2, out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf8"))
    assert results["grid"]["options"] == {"depth": 2, "channels": 2}
    page = (tmp_path / "compare.html").read_text(encoding="utf8")
    assert _loads_from_elsewhere(page) == []
    assert results["conditions"]["date"] in page and "torch" in page
    svg = ElementTree.fromstring((tmp_path / "learning-rate.svg").read_text(encoding="utf8"))
    labels = {node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"none", "clip", "default", "0.01", "0.1"} <= labels


def test_a_page_that_loads_from_elsewhere_is_noticed():
    page = '<link href="https://cdn.example/x.css"><script src="//cdn.example/p.js">"http://inside"</script>'
    assert len(_loads_from_elsewhere(page)) == 2


def test_compare_names_what_it_left_out_and_ends_with_code_one(capsys, tmp_path, monkeypatch):
    from gradsplit.lab import optimizers
    from gradsplit.lab.task import MissingPackageError

    def absent(package, name):
        raise MissingPackageError(f"method of the package {package}: expected it to be installed, found none.")

    monkeypatch.setattr(optimizers, "_package", absent)
    with pytest.raises(SystemExit) as ended:
        main([
            "compare", "plain-stack", "--methods", "none,soap", "--lr", "0.01", "--seeds", "2", "--steps", "2",
            "--option", "depth=2", "--option", "channels=2", "--jobs", "0", "--out", str(tmp_path),
        ])  # fmt: skip
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert (
        "left out: 2 runs of soap (first at lr 0.01, seed 1000): method of the package pytorch_optimizer" in shown.err
    )
    assert "\n none " in shown.out and "\n soap " not in shown.out
    assert (tmp_path / "results.json").is_file()


def test_compare_at_each_methods_own_rate(capsys, tmp_path):
    _run(
        "compare", "plain-stack", "--methods", "adamw,gso", "--lr", "usual", "--seeds", "1", "--steps", "2",
        "--optimizer", "adamw", "--schedule", "linear", "--option", "depth=2", "--option", "channels=2",
        "--jobs", "0", "--out", str(tmp_path),
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "0.001" in out and "0.03" in out and "ms/step" in out and "memory" in out
    assert "strength" not in out.split("over the learning rate")[0], "nothing is tuned, so the column would be empty"
    assert "worst bin" not in out and "scaled" not in out, "no method here splits"
    assert out.count("\n adamw ") == 2, "no name is cut in a terminal of 80 columns"
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf8"))
    assert [(cell["method"], cell["lr"]) for cell in results["cells"]] == [("adamw", 0.001), ("gso", 0.03)]


@pytest.mark.slow
def test_demo_ends_with_a_table_and_a_page(capsys, tmp_path):
    _run("demo", "--quick", "--out", str(tmp_path), "--jobs", "1")
    out = capsys.readouterr().out
    for heading in ("val_loss", "to target", "diverged", "ms/step", "memory"):
        assert heading in out
    raw = json.loads((tmp_path / "demo.json").read_text(encoding="utf8"))
    assert [scene["workload"] for scene in raw["scenes"]] == [scene.workload for scene in scenes()]
    page = (tmp_path / "demo.html").read_text(encoding="utf8")
    assert str(tmp_path / "demo.html") in out.replace("\n", "")
    assert _loads_from_elsewhere(page) == []
    assert len(page) < 1_000_000 and "plotly" not in page.lower()
    assert page.count("data:image/jpeg") == (raw["scenes"][0]["workload"] == "aerial"), (
        "the photograph stands there once"
    )
    for scene in raw["scenes"]:
        for row in scene["rows"]:
            assert row["label"] in page and row["steps_run"] == 20


def test_the_demo_shows_what_it_promises():
    assert [scene.workload for scene in (PHOTOGRAPHS, COMPOSED, TEXT)] == ["aerial", "detection", "gpt"]
    for scene in (PHOTOGRAPHS, COMPOSED, TEXT):
        assert scene.settings.optimizer == REGISTRY[scene.workload].optimizer
        methods = {row.method for row in scene.rows}
        assert {"none", "clip", "adamw+clip1+warmup", "gso"} <= methods and len(methods) == 6
        assert ("default" in methods) == (scene is not TEXT)
        for row in scene.rows:
            assert (row.strength is not None) == bool(METHODS[row.method].strengths)


def test_without_photographs_the_demo_shows_composed_scenes(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [scene.workload for scene in scenes()] == ["detection", "gpt"]


def test_a_row_of_the_demo_whose_package_is_missing_is_left_out_and_named(monkeypatch):
    found = importlib.util.find_spec
    assert "soap" in {row.method for row in scenes()[1].rows}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pytorch_optimizer" else found(name))
    text = scenes()[1]
    assert "soap" not in {row.method for row in text.rows} and len(text.rows) == 5
    assert text.expect.endswith("SOAP, tuned is left out: pip install pytorch-optimizer.")


def test_plan_counts_bins_and_bytes(capsys, tmp_path, monkeypatch):
    (tmp_path / "planned_model.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))\n"
        "SHAPES = {'huge': (7_000_000, 1000)}\n",
        encoding="utf8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    _run("plan", "planned_model:make")
    out = capsys.readouterr().out
    assert "4 tensors, 32 elements, 128 B in float32" in out
    cells = {line.split()[0]: line.split()[1:3] for line in out.splitlines() if len(line.split()) > 2}
    assert cells["whole"][0] == "1" and cells["per_tensor"][0] == "4"
    assert cells["xsp"][0] == str(5 + 1 + 2 + 1)
    assert cells["lbf"] == ["up", "to"]
    _run("plan", "planned_model:SHAPES", "--lines", "0", "--strategy", "whole")
    assert "28.0 GB" in capsys.readouterr().out


@pytest.fixture
def _cpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_doctor_names_versions_backends_and_data(capsys):
    from gradsplit.kernels import BACKENDS

    _run("doctor", "--all")
    out = capsys.readouterr().out
    assert f"gradsplit {gs.__version__}" in out and "core" in out
    for name in (*BACKENDS, "sklearn", "deepforest", "schedulefree"):
        assert f" {name} " in out


@pytest.mark.usefixtures("_cpu_alone")
def test_doctor_says_what_to_install(capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("sklearn", "numba") else found(name, *rest)
    )
    _run("doctor")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        f"gradsplit {gs.__version__} works here (cpu: backend eager). The backend numba is faster on cpu, but it needs "
        "the package numba: pip install numba."
    )
    assert any(line.startswith("  sklearn: pip install scikit-learn  (handwritten digits") for line in rest)
    _run("doctor", "--all")
    out = " ".join(capsys.readouterr().out.split())
    assert "missing: pip install scikit-learn" in out
    assert "no: it needs the package numba: pip install numba" in out


@pytest.mark.usefixtures("_cpu_alone")
def test_doctor_says_first_that_all_is_well(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    _run("doctor")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"All well: gradsplit {gs.__version__} works here (cpu: backend numba)."
    assert len(lines) == 4, "tables are shown on request"


@pytest.mark.usefixtures("_cpu_alone")
def test_doctor_says_first_what_is_broken_and_ends_with_code_one(capsys, monkeypatch):
    from gradsplit.kernels import Backend

    monkeypatch.setattr(Backend, "broken", lambda row: "importing it raised OSError: no LLVM" if row.needs else "")
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines()[0] == (
        "Not well: the backend numba does not load, so cpu is served more slowly; importing it raised OSError: no "
        "LLVM; run: pip install --force-reinstall numba."
    )


def test_report_without_plotly_prints_the_account_and_says_what_the_page_needs(capsys, tmp_path, monkeypatch):
    recorder = Recorder([RunWriter(tmp_path / "run.db", {"argv": ["train.py"]})])
    model = torch.nn.Linear(3, 2)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), sinks=[recorder])
    model(torch.ones(1, 3)).sum().backward()
    splitter.step()
    recorder.close()
    for name in [n for n in sys.modules if n.partition(".")[0] == "plotly" or n.startswith("gradsplit.watch.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    _run("report", str(tmp_path / "run.db"))
    printed = capsys.readouterr()
    assert "No norm left its own history" in printed.out
    assert printed.err == "no page: it needs the package plotly; run: pip install plotly\n"
    assert not (tmp_path / "run.html").exists()
