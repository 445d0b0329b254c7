"""The compiled backend: equal to the definition on every stride and dtype, and careful where it may not go."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch

import gradsplit as gs
from gradsplit.kernels import BACKENDS
from gradsplit.kernels.reference import ReferenceKernel

pytest.importorskip("numba", reason="the numba backend needs the package numba: pip install gradsplit[fast]")

from gradsplit.kernels.addressable import FallbackWarning
from gradsplit.kernels.numba_cpu import NumbaKernel

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _tensors(dtype):
    generator = torch.Generator().manual_seed(3)
    made = {
        "plain": torch.randn(9, 40, generator=generator),
        "transposed": torch.randn(40, 9, generator=generator).t(),
        "vector": torch.randn(7, generator=generator),
        "channels_last": torch.randn(6, 5, 2, 2, generator=generator).contiguous(memory_format=torch.channels_last),
        "scalar": torch.randn((), generator=generator),
        "part": torch.randn(8, 90, generator=generator)[:, 10:60],
        "every_second": torch.randn(30, generator=generator)[::2],
    }
    return {name: torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) for name, t in made.items()}


def _plans(layout):
    return {
        "rows": gs.xsp(layout),
        "thirds": gs.xsp(layout, parts=3),
        "columns": gs.xsp(layout, axis=1),
        "whole": gs.whole(layout),
        "tensors": gs.per_tensor(layout),
    }


def _decision(num_bins):
    generator = torch.Generator().manual_seed(4)
    scale = torch.rand(num_bins, dtype=torch.float64, generator=generator)
    scale[::2] = 1.0
    return scale, torch.rand(num_bins, generator=generator) < 0.2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rows", "thirds", "columns", "whole", "tensors"])
def test_equals_the_definition(dtype, name):
    tensors = _tensors(dtype)
    if name == "columns":  # of a channels_last convolution are not addressable: see below
        del tensors["channels_last"]
    plan = _plans(gs.Layout.from_shapes({key: t.shape for key, t in tensors.items()}))[name]
    ours, truth = list(tensors.values()), list(_tensors(dtype).values())
    if name == "columns":
        truth.pop(3)
    kernel, reference = NumbaKernel(plan, CPU), ReferenceKernel(plan, CPU)
    torch.testing.assert_close(kernel.squares(ours), reference.squares(truth), rtol=1e-12, atol=0)
    scale, zero = _decision(plan.num_bins)
    kernel.scale_(ours, scale, zero)
    reference.scale_(truth, scale, zero)
    for mine, true in zip(ours, truth, strict=True):
        assert torch.equal(mine, true)  # bit for bit, rounding of half precision included


def test_rounding_of_bfloat16_is_that_of_torch():
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16).reshape(256, 256).clone()
    expected = (every.float() * np.float32(0.7)).to(torch.bfloat16)
    plan = gs.per_tensor(gs.Layout.from_shapes({"w": (256, 256)}))
    NumbaKernel(plan, CPU).scale_([every], torch.tensor([0.7], dtype=torch.float64), torch.tensor([False]))
    same = (every == expected) | (every.isnan() & expected.isnan())
    assert bool(same.all())


def test_no_overflow_near_the_largest_float32():
    plan = gs.xsp(gs.Layout.from_shapes({"w": (2, 1000)}))
    squares = NumbaKernel(plan, CPU).squares([torch.full((2, 1000), 3e38)])
    torch.testing.assert_close(
        squares.sqrt(), torch.full((2,), 3e38 * 1000**0.5, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_the_number_of_threads_changes_no_bit():
    plan = gs.per_tensor(gs.Layout.from_shapes({"w": (1000, 700)}))
    gradient = torch.randn(1000, 700)
    kernel, before = NumbaKernel(plan, CPU), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernel.squares([gradient]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_new_strides_of_the_same_tensors_are_noticed():
    plan = gs.xsp(gs.Layout.from_shapes({"w": (6, 6)}))
    kernel, gradient = NumbaKernel(plan, CPU), torch.randn(6, 6)
    kernel.squares([gradient])
    gradient.t_()
    torch.testing.assert_close(kernel.squares([gradient]), gradient.double().square().sum(1))


def test_a_write_is_seen_by_autograd():
    plan = gs.xsp(gs.Layout.from_shapes({"w": (2, 3)}))
    gradient = torch.ones(2, 3)
    version = gradient._version
    NumbaKernel(plan, CPU).scale_([gradient], torch.tensor([0.5, 1.0], dtype=torch.float64), torch.zeros(2).bool())
    assert gradient._version > version


def _negative():
    return torch.randn(4, 6, dtype=torch.complex64).conj().imag


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_negative, "negative or conjugate"),
        (lambda: torch.randn(1, 6).expand(4, 6), "contiguous rows"),
    ],
    ids=["negative bit", "overlapping"],
)
def test_what_is_not_addressable_falls_back_with_one_warning(make, reason):
    plan = gs.xsp(gs.Layout.from_shapes({"w": (4, 6)}))
    kernel, gradient = NumbaKernel(plan, CPU), make()
    with pytest.warns(FallbackWarning, match=reason):
        squares = kernel.squares([gradient])
    torch.testing.assert_close(squares, gradient.double().square().sum(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.squares([gradient])


def test_columns_of_a_channels_last_tensor_fall_back():
    gradient = torch.randn(6, 5, 2, 2).contiguous(memory_format=torch.channels_last)
    plan = gs.xsp(gs.Layout.from_shapes({"w": gradient.shape}), axis=1)
    with pytest.warns(FallbackWarning, match="'w'"):
        squares = NumbaKernel(plan, CPU).squares([gradient])
    torch.testing.assert_close(squares, gradient.double().square().sum(0).reshape(-1))


def test_gradients_that_share_memory_are_scaled_in_order():
    plan = gs.per_tensor(gs.Layout.from_shapes({"a": (3, 4), "b": (3, 4)}))
    shared = torch.ones(3, 4)
    NumbaKernel(plan, CPU).scale_(
        [shared, shared], torch.tensor([0.5, 0.5], dtype=torch.float64), torch.zeros(2).bool()
    )
    assert torch.equal(shared, torch.full((3, 4), 0.25))


def test_from_several_threads_at_once():
    plan = gs.xsp(gs.Layout.from_shapes({"w": (64, 64)}))
    gradient, found = torch.randn(64, 64), []
    kernel = NumbaKernel(plan, CPU)
    workers = [threading.Thread(target=lambda: found.append(kernel.squares([gradient]))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 49])
def test_columns_add_up_however_many_rows_there_are(rows):
    plan = gs.xsp(gs.Layout.from_shapes({"w": (rows, 40)}), parts=20, axis=1)
    gradient = torch.randn(rows, 40)
    squares = NumbaKernel(plan, CPU).squares([gradient])
    torch.testing.assert_close(squares, gradient.double().square().sum(0).reshape(20, 2).sum(1))


def test_auto_takes_it_on_the_cpu():
    model = torch.nn.Linear(3, 2)
    assert gs.GradientSplitter(model, budget=gs.Fixed(1.0)).kernel.name == "numba"
    assert BACKENDS["numba"].missing(torch.device("cuda")) == "it serves cpu, not cuda"
