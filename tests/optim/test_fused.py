"""GSO's compiled update equals its eager definition, for every budget it has a way of its own for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import gradsplit as gs

pytest.importorskip("numba", reason="the fused update needs the package numba: pip install gradsplit[fast]")

from gradsplit.kernels.addressable import FallbackWarning

BUDGETS = {
    "default": (gs.Relative(0.2), gs.RelativeStep(0.03)),
    "unbounded": gs.Fixed(float("inf")),
    "step alone": gs.RelativeStep(0.01),
    "short rows": gs.RelativeStep(0.01, length=1.0),
    "history and root": {"bin": gs.Ema(1.5, warmup=2), "root": gs.Fixed(20.0)},
    "root and step": {"root": gs.Fixed(20.0), "bin": (gs.Relative(0.2), gs.RelativeStep(0.03))},
}
ONE_PASS = {"default", "unbounded", "step alone", "short rows"}


def _parameters(dtype):
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.randn(12, 20, generator=generator),
        torch.randn(20, 8, generator=generator).t(),
        torch.randn(7, generator=generator),
        torch.randn(4, 3, 2, 2, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randn((), generator=generator),
        torch.zeros(5, 6),
    ]
    return [Parameter(torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t)) for t in made]


def _train(dtype, backend, steps=5, **options):
    parameters = _parameters(dtype)
    optimizer = gs.GSO(parameters, lr=1e-2, backend=backend, **options, direction="adam")
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        for i, p in enumerate(parameters):
            gradient = torch.randn(p.shape, generator=generator) * (100 if step == 2 else 1)
            if step == 3 and p.dim() == 2:
                gradient[1, 2], gradient[3, 1] = float("nan"), float("inf")
            p.grad = None if step == 1 and i == 2 else torch.empty_like(p).copy_(gradient)
        optimizer.step()
    return parameters, optimizer


def _assert_same(ours, theirs, tolerance):
    for mine, true in zip(ours, theirs, strict=True):
        bound = tolerance * max(float(true.detach().abs().max()), 1e-3)
        assert float((mine - true).detach().abs().max()) <= bound


@pytest.mark.parametrize("moment", ["element", "bin"])
@pytest.mark.parametrize("name", BUDGETS)
def test_equals_the_definition(name, moment):
    options = {"budget": BUDGETS[name], "second_moment": moment}
    ours, optimizer = _train(torch.float32, "numba", **options)
    theirs, eager = _train(torch.float32, "eager", **options)
    (part,) = optimizer._parts
    assert type(part.update).__name__ == "FusedUpdate"
    assert part.update._tables[0][2] is (name in ONE_PASS)
    _assert_same(ours, theirs, 1e-5)
    torch.testing.assert_close(
        part.update.decision.scale_B, eager._parts[0].update.decision.scale_B, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)], ids=str
)
def test_other_dtypes(dtype, tolerance):
    ours, _ = _train(dtype, "numba")
    theirs, _ = _train(dtype, "eager")
    # Without the weights that start at 0: their squares fall below float16, in which the eager update computes.
    _assert_same(ours[:-1], theirs[:-1], tolerance)


def test_maximize_leaves_the_gradient_as_it_was():
    p = Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    gs.GSO([p], lr=0.1, maximize=True, weight_decay=0.0, backend="numba", direction="adam").step()
    assert torch.equal(p.grad, torch.ones(2, 3))
    assert bool((p > 1).all())


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_sums_outside_of_float32_are_taken_again(size):
    """Squares of these gradients under- or overflow in float32; the quick sums must notice."""
    ours, theirs = Parameter(torch.ones(3, 40)), Parameter(torch.ones(3, 40))
    for p, backend in ((ours, "numba"), (theirs, "eager")):
        p.grad = torch.full((3, 40), size)
        gs.GSO([p], lr=0.1, backend=backend, direction="adam").step()
    _assert_same([ours], [theirs], 1e-5)


def test_a_step_is_seen_by_autograd():
    p = Parameter(torch.ones(2, 3))
    p.grad, version = torch.ones(2, 3), p._version
    gs.GSO([p], lr=0.1, backend="numba", direction="adam").step()
    assert p._version > version


def test_strided_weights_fall_back_with_one_warning():
    """Moments of a weight with gaps have none, so no loop can address the two together."""
    memory = torch.randn(4, 10)
    p = Parameter(memory[:, :6])
    p.grad = torch.randn(4, 6)
    optimizer = gs.GSO([p], lr=1e-2, backend="numba", direction="adam")
    with pytest.warns(FallbackWarning, match="strides"):
        optimizer.step()
    optimizer.step()
    assert bool(p.isfinite().all())
