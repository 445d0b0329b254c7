"""GSO asks for torch's compiler only where a program uses it."""

from __future__ import annotations

import functools
import subprocess
import sys

import torch

import gradsplit as gs
from gradsplit.hooks import without_compiler_guard

_PROGRAM = """
import sys, torch
import gradsplit as gs
w = torch.nn.Parameter(torch.ones(2, 3))
w.grad = torch.ones(2, 3)
optimizer = gs.GSO([w], lr=1e-3)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
assert w.grad is None and len(optimizer.param_groups) == 1
print("torch._dynamo" in sys.modules)
"""


def test_making_a_gso_and_stepping_imports_no_compiler():
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_guard_stays_where_the_compiler_has_been_imported(monkeypatch):
    method = torch.optim.SGD([torch.ones(2)], lr=0.1).zero_grad
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    assert without_compiler_guard(method) is method


def test_only_torchs_own_guard_is_taken_off(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    seen: list[str] = []
    plain = torch.optim.Optimizer.zero_grad

    @functools.wraps(plain)
    def patched(self, set_to_none=True):
        seen.append("patched")
        return plain(self, set_to_none)

    w = torch.nn.Parameter(torch.ones(2))
    optimizer = gs.GSO([w], lr=0.1, direction="adam")
    bare = without_compiler_guard(super(gs.GSO, optimizer).zero_grad)
    assert bare.__globals__["__name__"] == "torch.optim.optimizer"
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", patched)
    w.grad = torch.ones(2)
    optimizer.zero_grad()
    assert seen == ["patched"] and w.grad is None
