"""torch's flags: what each means for GSO, which exclude each other, and states from elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsplit as gs
from tests.optim.small import model_of, train


@pytest.mark.parametrize("second_moment", ["element", "bin"])
@pytest.mark.parametrize(
    "budget",
    [gs.Fixed(float("inf")), (gs.Relative(0.2), gs.RelativeStep(0.03))],
    ids=["unbounded", "default"],
)
def test_autograd_sees_a_differentiable_step(second_moment, budget):
    """With respect to weights, gradients and moments, bounded rows and others, against finite differences."""
    torch.manual_seed(1)
    p, g, m = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    g[1] *= 0.01
    v = torch.rand(3, 4, dtype=torch.float64) + 0.5
    for tensor in (p, g, m, v):
        tensor.requires_grad_()

    fixed = v.detach().clone()

    def update(p, g, m, v=None):
        v = fixed if v is None else v
        p = p.clone()
        p.grad = g
        optimizer = gs.GSO(
            [p], lr=0.3, budget=budget, second_moment=second_moment, differentiable=True, direction="adam"
        )
        state = {"step": torch.tensor(4.0), "exp_avg": m.clone()}
        state |= {"exp_avg_sq": v.clone()} if second_moment == "element" else {"bin_sq": v.detach().sum(1)}
        optimizer.state[p].update(state)
        optimizer.step()
        return p, optimizer.state[p]["exp_avg"]

    inputs = (p, g, m, v) if second_moment == "element" else (p, g, m)  # statistics a bin are not differentiated
    assert torch.autograd.gradcheck(update, inputs, rtol=1e-3, atol=1e-6)


def test_a_gradient_of_zeros_has_a_derivative_too():
    p = torch.ones(2, 3, requires_grad=True)
    g = torch.zeros(2, 3, requires_grad=True)
    w = p.clone()
    w.grad = g
    optimizer = gs.GSO([w], lr=0.3, differentiable=True, direction="adam")
    optimizer.state[w].update(step=torch.tensor(1.0), exp_avg=torch.ones(2, 3), exp_avg_sq=torch.ones(2, 3))
    optimizer.step()
    w.sum().backward(inputs=[p, g])
    assert p.grad.isfinite().all()
    assert g.grad.isfinite().all()


@pytest.mark.parametrize("flags", [{"capturable": True}, {"fused": False}, {"differentiable": True}, {"fused": None}])
def test_a_flag_changes_how_a_step_is_made_and_not_what_it_does(flags):
    pytest.importorskip("numba", reason="the compiled update needs numba")
    if "differentiable" in flags:  # autograd would keep every step of a parameter that is a leaf
        return _differentiable_steps_are_the_same()
    model, other = model_of(), model_of()
    fused, changed = (
        gs.GSO(model, lr=0.05, fused=True, direction="adam"),
        gs.GSO(other, lr=0.05, **flags, direction="adam"),
    )
    for a, b in zip(train(model, fused, range(5)), train(other, changed, range(5)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return None


def _differentiable_steps_are_the_same():
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 4), torch.randn(3, 4)
    ends = []
    for differentiable in (False, True):
        p = nn.Parameter(start.clone()) if not differentiable else start.clone().requires_grad_().clone()
        optimizer = gs.GSO([p], lr=0.1, differentiable=differentiable, direction="adam")
        for _ in range(3):
            p.grad = gradient.clone()
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"foreach": True}, ValueError, r"GSO\(foreach=True\): expected None or False, .* Use fused=True"),
        (
            {"fused": True, "backend": "eager"},
            RuntimeError,
            "`fused=True` requires all the params .* got backend 'eager' on cpu. Use fused=None",
        ),
        ({"differentiable": True, "in_backward": True}, ValueError, "expected in_backward=False"),
        ({"differentiable": True, "backend": "numba"}, ValueError, "expected backend 'auto' or 'eager', .* Leave it"),
        ({"betas": (torch.tensor(0.9), 0.99)}, ValueError, "betas must be either both floats or both Tensors"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.99))}, ValueError, r"expected two numbers, .* Use float\(beta\)"),
    ],
)
def test_flags_without_a_meaning_are_refused_in_torchs_words_or_with_a_remedy(options, error, words):
    with pytest.raises(error, match=words):
        gs.GSO(model_of(), lr=0.1, **options, direction="adam")


def test_a_group_may_choose_its_update_but_not_whether_autograd_sees_it():
    pytest.importorskip("numba", reason="the compiled update needs numba")
    model = model_of()
    groups = [{"params": list(model[0].parameters()), "fused": False}, {"params": list(model[2].parameters())}]
    optimizer = gs.GSO(groups, lr=0.1, direction="adam")
    assert {type(part.update).__name__ for part in optimizer._parts} == {"ReferenceUpdate", "FusedUpdate"}
    with pytest.raises(ValueError, match="expected one value for all groups"):
        gs.GSO([{**groups[0], "fused": None, "differentiable": True}, groups[1]], lr=0.1, direction="adam")


def test_parameters_without_memory_are_refused_by_the_first_fused_step():
    p = nn.Parameter(torch.empty(2, 3, device="meta"))
    optimizer = gs.GSO([p], lr=0.1, fused=True, direction="adam")
    with pytest.warns(UserWarning, match="lie on the meta device"):
        optimizer.step()
    p.grad = torch.empty(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()


def test_the_state_of_adamw_is_taken_over():
    """The moments have the same names and meanings; where no limit binds the run goes on as AdamW's would."""
    model = model_of()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, adamw, range(3))
    other = copy.deepcopy(model)
    optimizer = gs.GSO(other, lr=0.05, budget=gs.Fixed(float("inf")), direction="adam")
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))  # loading shares the tensors
    for a, b in zip(train(model, adamw, range(3, 6)), train(other, optimizer, range(3, 6)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mine", "theirs"), [("element", "bin"), ("bin", "element")])
def test_moments_of_the_other_kind_are_refused(mine, theirs):
    model = model_of()
    saved = gs.GSO(model, lr=0.1, second_moment=theirs, direction="adam")
    train(model, saved, range(1))
    with pytest.raises(ValueError, match=f"expected '.*' in the state of parameter 0, .* second_moment='{theirs}'"):
        gs.GSO(model_of(), lr=0.1, second_moment=mine, direction="adam").load_state_dict(saved.state_dict())
