"""The laws of every backend that serves this machine: every strategy, dtype and memory layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsplit.kernels import BACKENDS
from gradsplit.plan import Layout, xsp
from tests.laws import laws_of_backends as laws
from tests.laws.cases import CPU, DTYPES, PLANS, STRIDES, ZOO, generator, served_backends, tensors

# Where a backend cannot serve a memory layout it falls back and says so; the laws hold all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*falls back to eager torch")

BACKEND = {name: BACKENDS[name].make for name in served_backends()}


def scales_and_zeros(plan, seed):
    """A third kept, a third scaled, a third zeroed."""
    rng = generator(seed)
    kind = rng.integers(0, 3, plan.num_bins)
    scale_B = np.where(kind == 0, 1.0, rng.random(plan.num_bins))
    return torch.from_numpy(np.where(kind == 2, 0.0, scale_B)), torch.from_numpy(kind == 2)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("strategy", PLANS)
@pytest.mark.parametrize("backend", BACKEND)
def test_on_every_plan_and_memory_layout(backend, strategy, strides):
    plan = PLANS[strategy](ZOO)
    for dtype in DTYPES:
        scale_B, zero_B = scales_and_zeros(plan, 1)
        make = BACKEND[backend]
        laws.check_squares(make, plan, tensors(ZOO, dtype, strides, 2))
        laws.check_scaling(make, plan, tensors(ZOO, dtype, strides, 2), scale_B, zero_B)
        laws.check_writes_reach_the_tensor(make, plan, tensors(ZOO, dtype, strides, 2))
        if backend != "reference":
            laws.check_equals_reference(make, plan, tensors(ZOO, dtype, strides, 2), scale_B, zero_B)


@pytest.mark.parametrize("backend", BACKEND)
def test_bins_of_several_boxes_and_absent_tensors(backend):
    layout = Layout.from_shapes({"a": (4, 3), "b": (5,), "c": (2, 2, 2)})
    for plan in (PLANS["whole"](layout), PLANS["lbf"](layout)):
        for absent in range(3):
            given_tensors = [
                None if t == absent else x for t, x in enumerate(tensors(layout, torch.float32, "gaps", 3))
            ]
            laws.check_squares(BACKEND[backend], plan, given_tensors)
            laws.check_scaling(BACKEND[backend], plan, given_tensors, *scales_and_zeros(plan, 4))
        none = BACKEND[backend](plan, CPU).squares([None] * 3)
        assert none.tolist() == [0.0] * plan.num_bins


# float32 values whose squares overflow float32 (above 1.8e19) or underflow it, with both signs of zero.
WIDE = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.9e19, -3e30, 3.4e38, 1e-38, 1e-45, 65504.0]),
)


@pytest.mark.parametrize("backend", BACKEND)
@settings(max_examples=40)
@given(values=st.lists(WIDE, min_size=12, max_size=12), seed=st.integers(0, 100))
def test_any_float32_values(backend, values, seed):
    layout = Layout.from_shapes({"w": (4, 3)})
    plan = xsp(layout)
    tensor = torch.tensor(values, dtype=torch.float32).reshape(4, 3)
    laws.check_squares(BACKEND[backend], plan, [tensor])
    assert torch.isfinite(BACKEND[backend](plan, CPU).squares([tensor])).all()
    laws.check_scaling(BACKEND[backend], plan, [tensor.clone()], *scales_and_zeros(plan, seed))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.is_complex], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKEND)
def test_one_bad_value_makes_one_square_bad(backend, bad, dtype):
    plan = PLANS["lbf, few bins"](ZOO)
    for target in (0, plan.num_bins // 2, plan.num_bins - 1):
        box = plan.bins[target].boxes[0]
        t = ZOO.names.index(box.tensor)
        given_tensors = tensors(ZOO, dtype, "contiguous", 5)
        given_tensors[t].view(ZOO.rows[t], ZOO.cols[t])[box.start] = bad
        squares_B = BACKEND[backend](plan, CPU).squares(given_tensors)
        assert (~torch.isfinite(squares_B)).nonzero().flatten().tolist() == [target]
        keep, only = torch.ones(plan.num_bins, dtype=torch.float64), torch.arange(plan.num_bins) == target
        keep[only] = 0
        laws.check_scaling(BACKEND[backend], plan, given_tensors, keep, only)


@pytest.mark.parametrize("backend", BACKEND)
def test_the_largest_bfloat16_and_float16_values_have_finite_squares(backend):
    plan = PLANS["xsp"](ZOO)
    for dtype in (torch.float16, torch.bfloat16):
        top = [torch.full(shape, torch.finfo(dtype).max, dtype=dtype) for shape in ZOO.shapes]
        assert torch.isfinite(BACKEND[backend](plan, CPU).squares(top)).all()
        laws.check_squares(BACKEND[backend], plan, top)
