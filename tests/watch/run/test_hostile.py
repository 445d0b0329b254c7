"""Scripts that are hostile without meaning it: they run as without us, and what was not recorded is said once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from gradsplit.watch.record import RunFile
from gradsplit.watch.run.launch import program_of
from gradsplit.watch.run.session import Session
from tests.watch.run.processes import environment, run_gradsplit, run_python
from tests.watch.run.watched import watched


def _rows(path):
    with RunFile(path) as file:
        return [file.num_rows(stream.index) for stream in file.streams]


class _Unhashable(torch.optim.SGD):
    def __eq__(self, other):
        raise RuntimeError("not to be compared")

    __hash__ = None


class _Factor(torch.optim.SGD):
    """Its step takes a number."""

    def step(self, factor):
        assert isinstance(factor, float)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"] * factor)


class _OfModel(torch.optim.SGD):
    """Its step takes the model."""

    def step(self, model):
        assert isinstance(model, nn.Module)
        super().step()


class _Secret(nn.Module):
    """It refuses to name its parameters."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def named_parameters(self, *args, **kwargs):
        raise RuntimeError("secret")

    def forward(self, x):
        return self.inner(x)


class _Closed(torch.Tensor):
    """It refuses to be detached and to be a number."""

    def detach(self):
        raise RuntimeError("closed")

    def __float__(self):
        raise RuntimeError("closed")


def _optimizers(model):
    return {
        "unhashable": (_Unhashable(model.parameters(), 0.1), ()),
        "a number": (_Factor(model.parameters(), 0.1), (0.5,)),
        "a module": (_OfModel(model.parameters(), 0.1), (model,)),
        "a tensor as rate": (torch.optim.SGD(model.parameters(), torch.tensor(0.1)), ()),
    }


def _trained(name, *, secret=False, closed=False, clip=None):
    torch.manual_seed(0)
    model = _Secret() if secret else nn.Linear(4, 1)
    optimizer, arguments = _optimizers(model.inner if secret else model)[name]
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        (loss.as_subclass(_Closed) if closed else loss).backward()
        if clip is not None:
            clip(model)
        optimizer.step(*arguments)
    return torch.cat([value.flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("name", ["unhashable", "a number", "a module", "a tensor as rate"])
def test_an_optimizer_of_its_own_kind_steps_as_without_us(tmp_path, name):
    alone = _trained(name)
    with watched(tmp_path / "run.db"):
        beside = _trained(name)
    assert torch.equal(alone, beside)
    assert _rows(tmp_path / "run.db") == [6]


@pytest.mark.parametrize("odd", [{"secret": True}, {"closed": True}], ids=["module", "loss"])
def test_what_refuses_to_be_looked_at_is_left_alone(tmp_path, odd, capsys):
    alone = _trained("a tensor as rate", **odd)
    with watched(tmp_path / "run.db"):
        beside = _trained("a tensor as rate", **odd)
    assert torch.equal(alone, beside)
    assert _rows(tmp_path / "run.db") == [6]
    assert "watching stopped" not in capsys.readouterr().err


_CLIPS = {
    "a tensor": lambda model: nn.utils.clip_grad_norm_(model.parameters(), torch.tensor(0.1)),
    "nothing": lambda model: nn.utils.clip_grad_norm_(iter([]), 1.0),
    "by name": lambda model: nn.utils.clip_grad_norm_(max_norm=0.1, norm_type=float("inf"), parameters=model.weight),
}


@pytest.mark.parametrize("clip", list(_CLIPS))
def test_the_scripts_own_clip_gets_what_it_was_given(tmp_path, clip):
    alone = _trained("a tensor as rate", clip=_CLIPS[clip])
    with watched(tmp_path / "run.db"):
        beside = _trained("a tensor as rate", clip=_CLIPS[clip])
    assert torch.equal(alone, beside)
    assert _rows(tmp_path / "run.db") == [6]


def test_a_fault_of_ours_at_the_beginning_of_a_step_is_not_the_scripts(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("ours")

    alone = _trained("a number")
    monkeypatch.setattr(Session, "_leave_parent", broken)
    with watched(tmp_path / "run.db"):
        beside = _trained("a number")
    assert torch.equal(alone, beside)
    assert capsys.readouterr().err.count("gradsplit: watching stopped, the training goes on") == 1


_TRAIN = """
import torch
from torch import nn
def train(steps):
    torch.manual_seed(0)
    m = nn.Linear(4, 1); o = torch.optim.AdamW(m.parameters())
    for i in range(steps):
        o.zero_grad(); loss = m(torch.randn(8, 4)).square().mean(); loss.backward(); o.step()
    print(loss.item(), flush=True)
"""
_LATE = "import atexit\natexit.register(lambda: train(5))\n" + _TRAIN + "train(3)\n"
_REMOVED = (
    _TRAIN
    + """
import glob, os, time
train(5); time.sleep(1.3)
for left in glob.glob("run.db*"): os.remove(left)
train(5)
"""
)


def _both(folder, text, *words):
    (folder / "train.py").write_text(text)
    alone = run_python(folder, "train.py")
    beside = run_gradsplit(folder, *words, "train.py")
    assert (beside.stdout, beside.returncode) == (alone.stdout, alone.returncode), beside.stderr
    return beside.stderr


def test_training_while_python_ends_is_recorded(tmp_path):
    _both(tmp_path, _LATE)
    assert _rows(tmp_path / "run.db") == [3, 5]


def test_a_run_file_that_the_script_removes_is_said_to_be_gone(tmp_path):
    said = _both(tmp_path, _REMOVED)
    assert said.count("gradsplit: ") == 1
    assert "run.db is gone: the script, or somebody else, has removed it" in said


_WITHOUT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


@pytest.mark.skipif(os.name == "nt", reason="folders of Windows have other rights")
@pytest.mark.parametrize("words", [(), ("--fail-on", "explosion"), ("--record", "deep/er/run.db")])
def test_in_a_folder_without_rights_the_script_runs(tmp_path, words):
    """As a user without rights; root keeps its user and gives up the rights to write everywhere."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and shutil.which("setpriv") is None:
        pytest.skip("not run: root may write everywhere, and setpriv, which takes that right away, is not installed")
    (tmp_path / "train.py").write_text(_TRAIN + "train(3)\n")
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run(
            [*(_WITHOUT if root else ()), sys.executable, "-m", "gradsplit.cli.run", *words, "train.py"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        tmp_path.chmod(0o755)
    assert done.returncode == (3 if "--fail-on" in words else 0), done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.count("nothing is recorded, the training goes on") == 1
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--fail-on", "explosion"), 2)])
def test_a_python_that_leaves_us_out_is_told_of(tmp_path, words, code):
    (tmp_path / "train.py").write_text("print('mine')\n")
    done = run_gradsplit(tmp_path, *words, os.path.basename(program_of(["-m", "this"])[0]), "-I", "train.py")
    assert done.returncode == code, done.stderr
    assert done.stdout == ("" if code else "mine\n")
    assert done.stderr.count("-I") >= 1
    assert ("nothing will be recorded" in done.stderr) == (code == 0)
