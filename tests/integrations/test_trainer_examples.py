"""The examples of trainers run and print a number, the one that their library's plain loop would give."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
import torch

import gradsplit as gs
from gradsplit.lab.registry import workload
from tests.architecture.sources import ROOT
from tests.watch.run.processes import run_python

STEPS = 6
EXAMPLES = ROOT / "examples"

pytestmark = [
    # Lightning 2.6 on torch 2.13: a class of torch's trees that Lightning still calls by its old name.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    # Lightning's advice on data loading, which six batches do not need.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]


def printed_by(name, capsys, monkeypatch, *words):
    """The one number that an example prints in its last line."""
    monkeypatch.setattr(sys, "argv", [name, "--steps", str(STEPS), *words])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (number,) = re.findall(r"^(?:score|val_loss) (\d+\.\d{3})$", capsys.readouterr().out, re.MULTILINE)
    return number


def plain(name, make, *, schedule=None, accumulate=1, steps=STEPS, ranks=1):
    """What a hand-written loop over the same batches scores; `make` gives an optimizer and a splitter or None.

    Accelerate moves a prepared schedule once a rank at each update, since a rank sees its share of the batches.
    """
    task = workload(name).build(seed=0)
    optimizer, splitter = make(task.model)
    scheduler = None if schedule is None else schedule(optimizer)
    for step in range(steps):
        (task.loss(task.model, task.batch(step)) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if splitter is not None:
                splitter.step()
            optimizer.step()
            if scheduler is not None:
                for _ in range(ranks):
                    scheduler.step()
            optimizer.zero_grad()
    return f"{task.evaluate(task.model)[workload(name).metric]:.3f}"


def sgd(lr, *, split=True, **options):
    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)
        return optimizer, gs.GradientSplitter(model, optimizer=optimizer) if split else None

    return make


def cosine(optimizer, updates=STEPS):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)


def test_lightning(capsys, monkeypatch):
    assert printed_by("lightning_detection", capsys, monkeypatch) == plain("detection", sgd(0.1))


def test_lightning_without_the_callback(capsys, monkeypatch):
    bare = plain("detection", sgd(0.1, split=False))
    assert printed_by("lightning_detection", capsys, monkeypatch, "--without") == bare


def test_transformers_with_gso(capsys, monkeypatch):
    expected = plain("gpt", lambda model: (gs.GSO(model, lr=0.03), None), schedule=cosine)
    assert printed_by("transformers_gpt", capsys, monkeypatch) == expected


def test_transformers_with_a_splitter(capsys, monkeypatch):
    expected = plain("gpt", sgd(0.3), schedule=cosine)
    assert printed_by("transformers_gpt", capsys, monkeypatch, "--sgd") == expected


def test_accelerate(capsys, monkeypatch):
    expected = plain("gpt", sgd(0.3), schedule=lambda o: cosine(o, STEPS // 2), accumulate=2)
    assert printed_by("accelerate_gpt", capsys, monkeypatch) == expected


@pytest.mark.slow
def test_accelerate_on_two_processes():
    """Two ranks with two micro-batches each are four micro-batches of one."""
    expected = plain("gpt", sgd(0.3), schedule=lambda o: cosine(o, 4), accumulate=4, steps=8, ranks=2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_python(ROOT, *launcher, str(EXAMPLES / "accelerate_gpt.py"), "--steps", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"val_loss {expected}\n"


@pytest.mark.parametrize("words", [(), ("--grad-accum-steps", "2"), ("--amp",)], ids=["plain", "accumulated", "bf16"])
def test_timm_style(capsys, monkeypatch, words):
    printed = printed_by("timm_style_detection", capsys, monkeypatch, *words)
    if "--amp" not in words:
        accumulate = 2 if words else 1
        assert printed == plain("detection", sgd(0.1, nesterov=True), accumulate=accumulate)
    assert 0 <= float(printed) <= 1


def test_torchtitan_style_goes_on_from_its_checkpoint_as_if_nothing_had_happened(capsys, monkeypatch):
    """The example stops halfway, and a trainer made anew goes on from the file."""
    expected = plain("gpt", sgd(0.3), schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, STEPS))
    assert printed_by("torchtitan_style_gpt", capsys, monkeypatch) == expected
