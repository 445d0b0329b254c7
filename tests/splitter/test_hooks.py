"""Hooks around a step: when they act, and that torch's compiler leaves marked functions alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gradsplit.hooks import after_backward, attach_to

_PROGRAM = """
import sys, torch
from gradsplit.hooks import not_traced

calls = []

@not_traced
def count(tensor):
    calls.append(torch.compiler.is_compiling())
    return tensor + len(calls)

count(torch.zeros(2))
assert "torch._dynamo" not in sys.modules
from torch._dynamo.testing import CompileCounter

counter = CompileCounter()
compiled = torch.compile(lambda tensor: count(tensor * 2.0) * 3.0, backend=counter)
sums = [compiled(torch.ones(2)).tolist()[0] for _ in range(4)]
print(sums, any(calls), counter.frame_count)
"""


def test_a_marked_function_is_never_traced_even_when_marked_before_the_compiler_came():
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    # two graphs, before and after the call; a traced count would be compiled anew for every value
    assert done.stdout.strip() == "[12.0, 15.0, 18.0, 21.0] False 2"


@pytest.mark.parametrize("by_keyword", [False, True])
def test_with_a_closure_the_hook_acts_at_the_end_of_every_call(by_keyword):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.LBFGS([weight], max_iter=2)
    events: list[str] = []
    handle = attach_to(
        optimizer,
        start=lambda: events.append("start"),
        before=lambda: events.append(f"before, gradients {torch.is_grad_enabled()}"),
        after=lambda: events.append("after"),
    )

    def closure():
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        events.append("backward")
        return loss

    if by_keyword:
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)
    inside = ["backward", "before, gradients False"]
    calls = events.count("backward")
    assert calls >= 2
    assert events == ["start", *inside * calls, "after"]
    handle.remove()
    events.clear()
    optimizer.step(closure)
    assert set(events) == {"backward"}


def test_without_a_closure_the_hook_acts_at_once_and_changes_no_argument():
    events: list[str] = []
    assert after_backward(lambda: events.append("act"), ("optimizer",), {"scaler": 1}) is None
    assert after_backward(lambda: events.append("act"), ("optimizer", None), {}) is None
    assert events == ["act", "act"]


def test_other_arguments_of_the_step_are_kept():
    (first, closure, last), kwargs = after_backward(list, ("optimizer", lambda: 7, "last"), {"flag": True})
    assert (first, closure(), last, kwargs) == ("optimizer", 7, "last", {"flag": True})
