"""One gradient, followed by tracing: through how many of the package's files does a step pass?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import gradsplit as gs
from tests.architecture.sources import PACKAGE

# A reader who follows a step opens that many files at most.
FILES_OF_A_SPLITTER_STEP = 11  # the records of a step have a file of their own
FILES_OF_A_GSO_STEP = {"adam": 11, "auto": 16}


def files_entered(act: Callable[[], Any]) -> list[str]:
    """The package's files in which a function was called, in the order of the first call."""
    seen: dict[str, None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen[frame.f_code.co_filename] = None

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)
    ours = f"{PACKAGE}/"
    return [name.removeprefix(ours) for name in seen if name.startswith(ours)]


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))


def _warm(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Three steps, and the gradients of a fourth; return the fourth step, which is to be traced."""
    x, y = torch.randn(32, 8), torch.randint(2, (32,))
    for step in range(4):
        if step:
            optimizer.step()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
    return optimizer.step


def test_a_step_of_the_splitter_passes_few_files():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gs.GradientSplitter(model, optimizer=optimizer).attach(optimizer)
    entered = files_entered(_warm(model, optimizer))
    assert "splitter.py" in entered
    assert len(entered) <= FILES_OF_A_SPLITTER_STEP, entered


@pytest.mark.parametrize("direction", FILES_OF_A_GSO_STEP)
def test_a_step_of_gso_passes_few_files(direction):
    model = _model()
    entered = files_entered(_warm(model, gs.GSO(model, direction=direction)))
    assert "optim/gso.py" in entered
    assert len(entered) <= FILES_OF_A_GSO_STEP[direction], entered


def test_the_trace_sees_every_file_and_each_once():
    layout = gs.Layout.from_shapes({"w": (2, 3)})
    assert files_entered(lambda: None) == []
    assert files_entered(lambda: (gs.xsp(layout), gs.xsp(layout))).count("plan/slices.py") == 1
