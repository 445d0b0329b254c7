"""Which backend serves, what is said when one cannot, and what a kernel does that overrides nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradsplit as gs
from gradsplit.distributed import make_kernel
from gradsplit.kernels import BACKENDS, Backend, Kernel, choose_backend
from gradsplit.kernels.kernel import accumulate_dtype
from gradsplit.plan import Layout

PLAN = gs.xsp(Layout.from_shapes({"w": (3, 2)}))
CPU = torch.device("cpu")


def test_automatic_takes_the_first_row_that_serves_the_device():
    fastest = next(row.name for row in BACKENDS.values() if row.automatic and not row.missing(CPU))
    assert make_kernel(PLAN, [torch.zeros(3, 2)], call="f").name == fastest
    assert make_kernel(PLAN, [torch.zeros(3, 2, device="meta")], call="f").name == "eager"
    assert not BACKENDS["reference"].automatic


def test_a_backend_says_what_it_lacks(monkeypatch):
    absent = Backend("fast", (".eager", "EagerKernel"), "a row of this test", needs="a_package_that_nobody_wrote")
    elsewhere = Backend("far", (".eager", "EagerKernel"), "a row of this test", devices=("cuda",))
    monkeypatch.setitem(BACKENDS, "fast", absent)
    monkeypatch.setitem(BACKENDS, "far", elsewhere)
    with pytest.raises(
        ValueError, match=r"f\(backend='fast'\): .* needs the package a_package.*: pip install .* Use 'auto'"
    ):
        choose_backend("fast", CPU, call="f")
    with pytest.raises(ValueError, match=r"f\(backend='far'\): .* serves cuda, not cpu. Use 'auto'"):
        make_kernel(PLAN, [torch.zeros(3, 2)], "far", call="f")
    with pytest.raises(ValueError, match=r"f\(backend='near'\): expected 'auto' or one of .*eager, .*reference"):
        make_kernel(PLAN, [torch.zeros(3, 2)], "near", call="f")


class Doubling(Kernel):
    """A kernel that defines what it must and nothing else."""

    name = "doubling"

    def squares(self, tensors):
        return torch.tensor([2.0 * float(t.square().sum()) for t in tensors], dtype=torch.float64)

    def scale_(self, tensors, scale_B, zero_B):
        raise AssertionError("not called here")


def test_a_kernel_need_only_measure_and_scale(monkeypatch):
    row = Backend("doubling", ("tests.kernels.test_choice", "Doubling"), "from outside of the package")
    monkeypatch.setitem(BACKENDS, "doubling", row)
    plan = gs.per_tensor(Layout.from_shapes({"w": (1, 2), "b": (1,)}))
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])]
    kernel = make_kernel(plan, tensors, "doubling", call="f")
    assert [s.tolist() for s in kernel.squares_many([tensors, [t * 2 for t in tensors]])] == [[10, 18], [40, 72]]
    assert kernel.squares_here(tensors).tolist() == [10, 18]
    assert not kernel.bounds_while_reading
    assert kernel.bound_(tensors, None, np.zeros((0, 3, 2))) is None
    assert kernel.local_plan is plan
    assert kernel.bins_are_local and kernel.spread_B.tolist() == [False, False]
    values = torch.ones(2)
    assert kernel.add_(values) is values
    assert values.tolist() == [1, 1]


@pytest.mark.parametrize("row", [row for row in BACKENDS.values() if not row.missing(CPU)], ids=lambda row: row.name)
def test_a_kernel_says_whether_it_bounds_while_it_reads(row):
    gradient = torch.full((3, 2), 2.0)
    lines = np.array([[[0.0], [1.0], [0.0]]])  # every row at most 1 long
    kernel = row.make(PLAN, CPU)
    done = kernel.bound_([gradient], None, lines)
    assert (done is not None) == kernel.bounds_while_reading
    if done is None:
        assert (gradient == 2).all(), "nothing may be half applied"
    else:
        torch.testing.assert_close(gradient.norm(dim=1), torch.ones(3))


def test_squares_are_added_in_float64_wherever_there_is_one():
    assert accumulate_dtype(CPU) == accumulate_dtype(torch.device("cuda")) == torch.float64
    assert accumulate_dtype(torch.device("mps")) == torch.float32
