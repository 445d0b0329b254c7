"""What a splitter says to someone who wires it wrongly: never called, called too late, copied, swapped, moved."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.hooks import Unseen


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 4))


def backward(model):
    for p in model.parameters():
        p.grad = None
    model(torch.ones(3, 4)).square().mean().backward()


def trained(model, optimizer, steps, between=lambda: None, after=lambda: None):
    """Train, and return what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            backward(model)
            between()
            optimizer.step()
            after()
    return [str(one.message) for one in told]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("is_kept", [True, False])
def test_a_splitter_that_is_never_called_says_so_once_and_names_the_call(kind, is_kept):
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.01)
    kept = [gs.GradientSplitter(model, optimizer=optimizer)]
    if not is_kept:
        kept.clear()
        gc.collect()
    assert trained(model, optimizer, Unseen.STEPS - 1) == []
    told = trained(model, optimizer, 10)
    name = kind.__name__
    assert told == [
        f"GradientSplitter(optimizer={name}): {name} made 3 steps and none of them was bounded. Write splitter.step() "
        "between backward() and optimizer.step(), or splitter.attach(optimizer) once after making it."
    ]


def test_a_splitter_that_was_only_asked_for_words_says_nothing():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    gs.GradientSplitter(model, optimizer=optimizer).describe()
    gc.collect()
    assert trained(model, optimizer, 10) == []


@pytest.mark.parametrize("how", ["step", "attach"])
def test_the_hook_that_counts_steps_goes_with_the_first_step(how):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    if how == "attach":
        handle = splitter.attach(optimizer)
        handle.remove()
    else:
        assert trained(model, optimizer, 1, between=splitter.step) == []
    assert not optimizer._optimizer_step_post_hooks
    assert trained(model, optimizer, 10, between=splitter.step) == []


def test_a_step_after_the_optimizers_is_told_once():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    told = trained(model, optimizer, 5, after=splitter.step)
    assert len(told) == 1
    assert told[0].startswith(
        "GradientSplitter.step(): AdamW made its step with these gradients before they were bound"
    )
    assert "Write splitter.step() between backward() and optimizer.step()" in told[0]


def test_unbounded_steps_before_the_first_bounded_one_are_a_choice():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    assert trained(model, optimizer, Unseen.STEPS - 1) == []
    assert trained(model, optimizer, 5, between=splitter.step) == []


def test_a_hook_of_ones_own_may_call_the_step():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    seen = []
    optimizer.register_step_post_hook(lambda *_: splitter.step())
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    told = trained(model, optimizer, 5)
    assert len(seen) == 5
    assert len(told) == 1
    assert "before they were bounded" in told[0]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_splitter_is_not_copied_but_its_state_is(copied):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"of a GradientSplitter: .* call load_state_dict\(splitter.state_dict\(\)\)"):
        copied(splitter)
    copied(splitter.state_dict())


def test_a_copied_optimizer_stands_alone_and_takes_a_splitter_of_its_own():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    first = gs.GradientSplitter(model, optimizer=optimizer)
    first.attach(optimizer)
    with pytest.warns(UserWarning, match="copy or pickle of SGD"):
        again, optimizer_again = copy.deepcopy((model, optimizer))
    second = gs.GradientSplitter(again, optimizer=optimizer_again)
    second.attach(optimizer_again)
    second.load_state_dict(first.state_dict())
    before = again[0].weight.detach().clone()
    assert trained(again, optimizer_again, 1) == []
    assert ((again[0].weight - before).norm(dim=1) <= 0.0301).all()
    assert (first.step_count, second.step_count) == (0, 1)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_parameter_of_another_shape_is_refused_before_memory_is_read(backend):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, optimizer=optimizer, backend=backend)
    backward(model)
    splitter.step()
    model[0].weight.data = torch.randn(7, 4)
    model[0].weight.grad = torch.ones(7, 4)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"shape \(20, 4\) at '0.weight', .* got \(7, 4\). Make a new Grad"):
        splitter.step()
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    assert splitter.step_count == 1


@pytest.mark.parametrize("direction", [None, "adam"])
def test_gso_refuses_a_parameter_of_another_shape_too(direction):
    model = model_of()
    optimizer = gs.GSO(model) if direction is None else gs.GSO(model, direction=direction)
    backward(model)
    optimizer.step()
    model[0].weight.data = torch.randn(7, 4)
    model[0].weight.grad = torch.ones(7, 4)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"GSO.step\(\): expected .*\(20, 4\).* got \(7, 4\). Make a new GSO"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_group_that_was_taken_out_is_named():
    model = model_of()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    optimizer.param_groups.pop()
    backward(model)
    with pytest.raises(ValueError, match=r"got an optimizer that no longer holds '2.weight' and 1 more. Make a new"):
        splitter.step()


def test_an_optimizer_in_the_models_place_is_named():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"GradientSplitter\(AdamW\): .* Write GradientSplitter\(model, optimizer=opt"):
        gs.GradientSplitter(optimizer, optimizer=model)


def test_a_momentum_without_end_is_refused_where_the_step_is_bounded():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match=r"optimizer=SGD\): .* with momentum=1.0 it has no bound. Use a momentum b"):
        gs.GradientSplitter(model, optimizer=optimizer)
    gs.GradientSplitter(model, budget="relative", optimizer=optimizer)


@pytest.mark.parametrize(("decay", "is_said"), [(0.0, False), (0.1, True)])
def test_weight_decay_of_sgd_is_said_to_come_on_top(decay, is_said):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
    said = gs.GradientSplitter(model, optimizer=optimizer).describe()
    assert ("Weight decay is added to it." in said) == is_said


class Bare(torch.optim.Optimizer):
    """A wrapper that never calls the constructor of torch, so that it has no hooks."""

    def __init__(self, inside):
        self.inside = inside

    param_groups = property(lambda self: self.inside.param_groups)

    def step(self, closure=None):
        return self.inside.step(closure)


def test_a_wrapper_without_hooks_is_refused_by_attach_and_served_by_step():
    model = model_of()
    optimizer = Bare(torch.optim.AdamW(model.parameters()))
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"attach\(Bare\): .* Pass the optimizer inside it, or call step\(\) yourself"):
        splitter.attach(optimizer)
    backward(model)
    splitter.step()
    assert splitter.step_count == 1


def test_under_a_scaler_an_attached_splitter_sees_no_step_that_is_left_out():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    splitter.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for size in (1.0, 1e30, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(3, 4)).square().mean() * size * size).backward()
        scaler.step(optimizer)
        scaler.update()
    assert splitter.step_count == 2
    assert scaler.get_scale() == 32768.0


def test_wrappers_whose_sums_stay_wrapped_are_served_by_eager_torch():
    """torch's own test wrapper: two tensors in one, and every operation is done to both."""
    from torch.testing._internal.two_tensor import TwoTensor

    made = []
    for wrap in (lambda x: x, lambda x: TwoTensor(x, x.clone())):
        w = nn.Parameter(wrap(torch.ones(4, 3)))
        splitter = gs.GradientSplitter([("w", w)], budget=gs.Relative(0.1), backend="numba")
        w.grad = wrap(torch.arange(12.0).view(4, 3))
        with contextlib.nullcontext() if not made else pytest.warns(UserWarning, match="it is a TwoTensor"):
            splitter.step()
        made.append(w.grad)
    assert float(made[0].norm(dim=1).max()) < 0.2
    torch.testing.assert_close(made[1].a, made[0])
    torch.testing.assert_close(made[1].b, made[0])
