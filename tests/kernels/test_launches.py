"""How many operations a step of the splitter dispatches on a GPT of 148 tensors; these are bars, nothing is timed."""

from __future__ import annotations

import pytest
import torch

from gradsplit.kernels import eager
from tests.kernels.launches import FULL, SPLITTERS, TINY, Operations, named

MOST = 350
"""Dispatched operations of one warm step, views left out."""

# Tiny tensors are read and scaled beside each other; of the full widths only the vectors are. The meta device
# dispatches what a GPU would, and computes nothing.
LAYOUTS = {"tiny": (TINY, "cpu"), "tiny, no values": (TINY, "meta"), "full": (FULL, "meta")}


def operations(make, layout):
    shapes, device = LAYOUTS[layout]
    pairs = named(shapes, device)
    splitter = make(pairs, "eager")
    splitter.step()
    with Operations(device) as seen:
        splitter.step()
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [which for which in SPLITTERS if which != "nearest"])  # it sorts at every depth
def test_a_warm_step_dispatches_few_operations(which, layout):
    seen = operations(SPLITTERS[which], layout)
    assert seen.total() <= MOST, seen.seen
    assert not seen.brought


@pytest.mark.parametrize("layout", ["tiny", "tiny, no values"])
@pytest.mark.parametrize("which", SPLITTERS)
def test_a_warm_step_sends_nothing_that_it_waits_for(which, layout):
    """A number that is copied from the host in a blocking way makes the host wait for all that runs on the device."""
    assert not operations(SPLITTERS[which], layout).sent


def test_the_count_can_fail(monkeypatch):
    """One tensor at a time is what it was before: more than twice the bar."""
    monkeypatch.setattr(
        eager.EagerKernel,
        "_together",
        lambda kernel, tensors: (None, [t for t, x in enumerate(tensors) if x is not None]),
    )
    assert operations(SPLITTERS["the default"], "tiny").total() > 2 * MOST


def test_what_is_sent_is_seen():
    with Operations("cpu") as seen:
        torch.as_tensor(0.5, dtype=torch.float64)
    assert seen.sent
    with Operations("meta") as seen:
        torch.zeros(3).to("meta")
    assert seen.sent
    with Operations("meta") as seen:
        torch.full((), 0.5, device="meta")
        torch.zeros(3).to("meta", non_blocking=True)
    assert not seen.sent
