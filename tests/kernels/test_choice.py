"""Which backend serves, and what is said when one cannot."""

from __future__ import annotations

import pytest
import torch

import gradsplit as gs
from gradsplit.kernels import BACKENDS, Backend, make_kernel
from gradsplit.kernels.kernel import accumulate_dtype
from gradsplit.plan import Layout

PLAN = gs.xsp(Layout.from_shapes({"w": (3, 2)}))
CPU = torch.device("cpu")


def test_automatic_takes_the_first_row_that_serves_the_device():
    fastest = next(row.name for row in BACKENDS.values() if row.automatic and not row.missing(CPU))
    assert make_kernel("auto", PLAN, CPU, call="f").name == fastest
    assert make_kernel("auto", PLAN, torch.device("meta"), call="f").name == "eager"
    assert not BACKENDS["reference"].automatic


def test_a_backend_says_what_it_lacks(monkeypatch):
    absent = Backend("fast", (".eager", "EagerKernel"), "a row of this test", needs="a_package_that_nobody_wrote")
    elsewhere = Backend("far", (".eager", "EagerKernel"), "a row of this test", devices=("cuda",))
    monkeypatch.setitem(BACKENDS, "fast", absent)
    monkeypatch.setitem(BACKENDS, "far", elsewhere)
    with pytest.raises(
        ValueError, match=r"f\(backend='fast'\): .* needs the package a_package.*: pip install .* Use 'auto'"
    ):
        make_kernel("fast", PLAN, CPU, call="f")
    with pytest.raises(ValueError, match=r"f\(backend='far'\): .* serves cuda, not cpu. Use 'auto'"):
        make_kernel("far", PLAN, CPU, call="f")
    with pytest.raises(ValueError, match=r"f\(backend='near'\): expected 'auto' or one of .*eager, .*reference"):
        make_kernel("near", PLAN, CPU, call="f")


def test_squares_are_added_in_float64_wherever_there_is_one():
    assert accumulate_dtype(CPU) == accumulate_dtype(torch.device("cuda")) == torch.float64
    assert accumulate_dtype(torch.device("mps")) == torch.float32
