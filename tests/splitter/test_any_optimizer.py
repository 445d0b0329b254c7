"""The three lines of the README at every optimizer, and what is refused there and why."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import gradsplit as gs

prodigyopt = pytest.importorskip("prodigyopt")
others = pytest.importorskip("pytorch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

OF_TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
OF_PYPI = {
    "SOAP": others.SOAP,
    "Lion": others.Lion,
    "DAdaptAdam": others.DAdaptAdam,
    "pytorch_optimizer.Muon": others.Muon,
    "AdamWScheduleFree": schedulefree.AdamWScheduleFree,
    "SGDScheduleFree": schedulefree.SGDScheduleFree,
    "RAdamScheduleFree": schedulefree.RAdamScheduleFree,
    "ScheduleFreeWrapper": lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1)),
    "Prodigy": prodigyopt.Prodigy,
    "Lookahead": lambda p: others.Lookahead(torch.optim.AdamW(p)),
}
RATES = {"SGD": 0.1, "ASGD": 0.1, "LBFGS": 0.5, "SparseAdam": 0.01}


class Words(nn.Module):
    """An embedding with sparse gradients, for SparseAdam."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=True)

    def forward(self, x):
        return self.table(x.abs().sum(1).long() % 6)


def model_for(name):
    torch.manual_seed(0)
    if name == "SparseAdam":
        return Words()
    bias = "Muon" not in name  # which takes matrices alone
    return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias))


def made(name, model, **options):
    kind = {**OF_TORCH, **OF_PYPI}[name]
    if name in RATES:
        options = {"lr": RATES[name], **options}
    if name == "pytorch_optimizer.Muon":
        return kind([{"params": list(model.parameters()), "use_muon": True}], **options)
    return kind(model.parameters(), **options)


@pytest.mark.parametrize("name", [*OF_TORCH, *OF_PYPI])
def test_the_three_lines_run_and_a_fault_stays_in_its_row(name):
    model = model_for(name)
    optimizer = made(name, model)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    if hasattr(optimizer, "train"):
        optimizer.train()
    needs_closure = name == "LBFGS"
    for step in range(8):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

        def closure(x=x, step=step):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            if step in (3, 5):
                weight = next(iter(model.parameters()))
                if weight.grad.is_sparse:
                    weight.grad = weight.grad.coalesce()
                    weight.grad.values()[0, 0] = float("nan")
                else:
                    weight.grad[1, 2] = float("nan")
            return loss

        loss = closure()
        record = splitter.step()
        optimizer.step(closure) if needs_closure else optimizer.step()
        assert record.norm_after_B().isfinite().all()
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
    said = splitter.describe()
    assert "A bin that is not finite becomes zero." in said
    assert any(word in said for word in ("follows the gradient", "does not bound the step", "the first call"))


def test_in_front_of_adam_single_rows_are_bounded_and_a_whole_batch_is_divided():
    model = nn.Linear(4, 20, bias=False)
    splitter = gs.GradientSplitter(model, optimizer=torch.optim.AdamW(model.parameters()))
    small = 1e-3 * torch.ones(20, 4)
    for _ in range(5):
        model.weight.grad = small.clone()
        splitter.step()
        assert torch.equal(model.weight.grad, small)
    model.weight.grad = 1e3 * small
    splitter.step()
    torch.testing.assert_close(model.weight.grad, small)
    model.weight.grad = small.clone()
    model.weight.grad[2] *= 1e6
    splitter.step()
    limit = model.weight[2].norm()
    torch.testing.assert_close(model.weight.grad[2].norm(), limit)
    model.weight.grad[2] = small[2]
    assert torch.equal(model.weight.grad, small)


@pytest.mark.parametrize("collective", [True, False])
def test_the_collective_rule_acts_while_a_history_still_lets_everything_through(collective):
    model = nn.Linear(4, 20, bias=False)
    splitter = gs.GradientSplitter(model, budget=gs.Ema(1.5), collective=collective)
    for times in (1.0, 1e3):
        model.weight.grad = torch.full((20, 4), times)
        splitter.step()
    torch.testing.assert_close(model.weight.grad, torch.full((20, 4), 1.0 if collective else 1e3))


def test_the_collective_rule_is_saved_and_may_be_chosen():
    def after(splitter, sizes):
        for size in sizes:
            splitter.parameters[0].grad = torch.full((16, 4), 1e-3 * size)
            splitter.step()
        return splitter.parameters[0].grad

    torch.manual_seed(0)
    model = nn.Linear(4, 16, bias=False)
    first = gs.GradientSplitter(model, optimizer=torch.optim.Adam(model.parameters()))
    after(first, [1.0, 1.2, 0.9])
    saved = copy.deepcopy(first.state_dict())
    again = gs.GradientSplitter(model, optimizer=torch.optim.Adam(model.parameters()))
    again.load_state_dict(saved)
    assert torch.equal(after(first, [300.0]).clone(), after(again, [300.0]))
    older = {key: value for key, value in saved.items() if key != "collective"}
    again.load_state_dict(older)  # a state of a version before the rule
    broken = {**saved, "collective": {"recent": torch.ones(3), "steps": torch.zeros(())}}
    with pytest.raises(ValueError, match="expected 16 numbers >= 0 at 'recent' of the collective rule"):
        again.load_state_dict(broken)
    without = gs.GradientSplitter(model, optimizer=torch.optim.Adam(model.parameters()), collective=False)
    with_it = gs.GradientSplitter(model, budget=gs.Fixed(1e9), collective=True)
    assert after(without, [1.0, 100.0]).mean() > 0.04
    torch.testing.assert_close(after(with_it, [1.0, 100.0]), torch.full((16, 4), 1e-3))


def closure_of(model, optimizer, calls):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(7))

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_is_the_same_bit_for_bit_where_all_is_finite(search):
    finals = []
    for split in (False, True):
        model, calls = model_for("LBFGS"), []
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, line_search_fn=search)
        splitter = gs.GradientSplitter(model, optimizer=optimizer) if split else None
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer, calls))
        assert len(calls) > 6
        if splitter is not None:
            assert splitter.step_count == 3, "one decision per step"
        finals.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_with_lbfgs_the_first_call_of_the_closure_decides_for_the_step():
    model, seen = model_for("LBFGS"), []
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    splitter = gs.GradientSplitter(model, "whole", gs.Fixed(0.01), optimizer=optimizer)
    splitter.step = lambda inner=splitter.step: seen.append(inner()) or seen[-1]
    optimizer.step(closure_of(model, optimizer, []))
    assert len(seen) > 2
    scales = [record.decision.scale_B.item() for record in seen]
    assert scales[0] < 1
    assert set(scales) == {scales[0]}


def test_the_largest_rate_is_restored_with_the_optimizer():
    def move(model, optimizer):
        before = model.weight.detach().clone()
        model.weight.grad = torch.full_like(model.weight, 1e3)
        optimizer.step()
        return ((model.weight.detach() - before).norm() / 0.03).item()

    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gs.GradientSplitter(model, optimizer=optimizer).attach(optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    moves = []
    for rate in (0.1, 10.0, None):
        optimizer.load_state_dict(copy.deepcopy(saved))
        model.load_state_dict(weights)
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        moves.append(move(model, optimizer))
    assert moves == pytest.approx([1.0, 1.0, 1.0])
    optimizer.param_groups[0]["lr"] = 0.01  # a schedule, and not another run
    assert move(model, optimizer) == pytest.approx(0.1, rel=1e-4)


def test_a_rate_that_was_saved_before_the_splitter_is_restored_too():
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    for rate, state in ((10.0, saved), (None, saved)):
        optimizer.load_state_dict(copy.deepcopy(state))
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        model.weight.grad = torch.full_like(model.weight, 1e3)
        splitter.step()
    assert splitter.state_dict()["top_lr"] == [0.1]


REFUSED = {
    "AdamWScheduleFree": r"AdamWScheduleFree, cap_updates=True\).*average y.* leaves the sequence z free",
    "Prodigy": r"Prodigy, cap_updates=True\).*estimates the distance",
    "DAdaptAdam": r"DAdaptAdam, cap_updates=True\).*estimates the distance",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cap_is_refused_by_name_where_it_would_do_harm(name):
    model = model_for(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        gs.GradientSplitter(model, optimizer=made(name, model), cap_updates=True)


def test_a_line_search_bears_neither_a_cap_nor_a_limit_in_front():
    model = model_for("LBFGS")
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match="its line search has checked the loss"):
        gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True)
    with pytest.raises(ValueError, match=r"expected no limit in front of a line search.*line_search_fn=None"):
        gs.GradientSplitter(model, budget="ema", optimizer=optimizer)


def test_inside_the_wrapper_of_schedule_free_z_is_capped():
    model = nn.Linear(4, 3, bias=False)
    base = torch.optim.SGD(model.parameters(), lr=30.0)
    gs.GradientSplitter(model, optimizer=base, cap_updates=True)
    optimizer = schedulefree.ScheduleFreeWrapper(base)
    optimizer.train()
    z = model.weight.detach().clone()
    for _ in range(4):
        model.weight.grad = torch.randn(3, 4)
        optimizer.step()
        now = optimizer.state[model.weight]["z"].clone()
        assert ((now - z).norm(dim=1) <= 0.03 * z.norm(dim=1) * (1 + 1e-5)).all()
        assert not torch.equal(now, z)
        z = now


def other_parameters(model, optimizer):
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in model.parameters()]


def test_replaced_parameters_are_an_error_and_added_ones_a_warning():
    model = model_for("AdamW")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(model.parameters())
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    more = nn.Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [more]})
    with pytest.warns(UserWarning, match=r"1 parameters of the optimizer were added after .* shape \(5,\): no limit"):
        splitter.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splitter.step()
    other_parameters(model, optimizer)
    with pytest.raises(ValueError, match=r"others in the place of '0.weight' and 3 more. Make a new splitter"):
        splitter.step()


def test_parameters_that_nobody_bounds_are_warned_of_unless_pairs_were_given():
    model = model_for("AdamW")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(
        UserWarning, match=r"2 parameters of the optimizer are not in the model that was given, the first"
    ):
        gs.GradientSplitter(model[0], optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gs.GradientSplitter(model[0].named_parameters(), optimizer=optimizer)


def test_one_splitter_per_parameter_is_attached():
    model = model_for("AdamW")
    optimizer = torch.optim.AdamW(model.parameters())
    first = gs.GradientSplitter(model)
    handle = first.attach(optimizer)
    assert first.attach(optimizer) is handle
    second = gs.GradientSplitter(model, "per_tensor")
    with pytest.raises(ValueError, match=r"attach\(AdamW\): expected one splitter per parameter, .* '0.weight' and 3"):
        second.attach(optimizer)
    handle.remove()
    second.attach(optimizer)


def test_a_splitter_is_attached_to_one_optimizer():
    model = model_for("AdamW")
    first, second = torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, optimizer=first)
    handle = splitter.attach(first)
    with pytest.raises(ValueError, match=r"attach\(SGD\): .* second one beside AdamW, .* Call remove\(\)"):
        splitter.attach(second)
    assert splitter.optimizer is first
    handle.remove()
    splitter.attach(second)
    assert splitter.optimizer is second


def test_two_splitters_that_act_on_one_gradient_are_warned_of():
    model = model_for("AdamW")
    optimizer = torch.optim.AdamW(model.parameters())
    first, second = (gs.GradientSplitter(model, optimizer=optimizer) for _ in range(2))
    elsewhere = gs.GradientSplitter(model, optimizer=torch.optim.AdamW(model.parameters()))

    def gradients():
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    gradients()
    first.step()
    with pytest.warns(UserWarning, match=r"another splitter at this AdamW has bounded these gradients already"):
        second.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients()
        second.step()  # other gradients: one after the other is a choice
        elsewhere.step()
        gradients()
        first.step()
        first.step()


def backward(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(3, 4)).square().mean().backward()


def by_hand(model):
    def step(closure=None):
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad

    return step


@pytest.mark.parametrize("caps", [False, True])
@pytest.mark.parametrize("how", ["before", "after", "class", "copy"])
def test_a_step_that_runs_no_hooks_is_told_once(how, caps):
    class Mine(torch.optim.AdamW):
        """Patched for this test alone."""

    model = model_for("AdamW")
    optimizer = Mine(model.parameters())
    if how == "before":
        optimizer.step = by_hand(model)
    splitter = gs.GradientSplitter(model, optimizer=optimizer, cap_updates=caps)
    splitter.attach(optimizer)
    if how == "after":
        optimizer.step = by_hand(model)
    elif how == "class":
        Mine.step = lambda self, closure=None: by_hand(model)()
    steps = optimizer
    if how == "copy":  # of the optimizer alone: it goes on with the weights of the model
        with pytest.warns(UserWarning, match="copy or pickle of Mine"):
            steps = copy.deepcopy(optimizer)
        for group, own in zip(steps.param_groups, optimizer.param_groups, strict=True):
            group["params"] = own["params"]
    with pytest.warns(UserWarning, match=r"attach\(Mine\): the weights changed 3 times and no step of Mine") as told:
        for _ in range(8):
            backward(model, steps)
            steps.step()
    assert len(told) == 1
    assert splitter.step_count == 0


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LBFGS"])
def test_a_step_that_is_seen_takes_the_look_at_the_weights_away(name):
    model = model_for(name)
    optimizer = made(name, model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)  # it patches the step
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    splitter.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):  # passes whose gradients are only looked at, or accumulated
            backward(model, optimizer)
        for _ in range(5):
            optimizer.step(closure_of(model, optimizer, []))
            schedule.step()
    assert splitter.step_count == 5
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_optimizer_with_bounds_of_its_own_is_warned_of_once():
    model = model_for("AdamW")
    optimizer = gs.GSO(model)
    with pytest.warns(UserWarning, match=r"optimizer=GSO\): GSO bounds the gradient .* limits hold twice") as told:
        gs.GradientSplitter(model, optimizer=optimizer).attach(optimizer)
    assert len(told) == 1


def test_a_momentum_that_is_raised_to_one_between_steps_is_refused():
    model = model_for("SGD")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    backward(model, optimizer)
    splitter.step()
    optimizer.param_groups[0]["momentum"] = 1.0
    with pytest.raises(ValueError, match=r"optimizer=SGD\): expected a momentum below 1, got momentum=1.0"):
        splitter.step()


def test_a_foreign_optimizer_is_refused_and_a_model_that_was_cast_goes_on():
    model = model_for("AdamW")
    for make in (lambda o: gs.GradientSplitter(model, optimizer=o), gs.GradientSplitter(model, budget="fixed").attach):
        with pytest.raises(ValueError, match=r"expected an optimizer of this model's parameters, got one without '0"):
            make(torch.optim.AdamW(model_for("AdamW").parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=10.0)
    gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        optimizer.state.clear()
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.dtype == dtype
            assert 0 < (p - old).norm() < 0.031 * max(float(old.norm()), 0.01 * old.numel() ** 0.5)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (object(), r"GradientSplitter\(optimizer=object\): expected a torch optimizer with param_groups"),
        ([], r"GradientSplitter\(optimizer=list\).*Make one splitter per optimizer"),
        ({}, r"GradientSplitter\(optimizer=dict\).*Make one splitter per optimizer, each with pairs"),
        (torch.optim.AdamW, r"optimizer=AdamW, a class\): .* Write AdamW\(model.parameters\(\)\)"),
        ("adamw", r"GradientSplitter\(optimizer=str\): expected a torch optimizer"),
    ],
)
def test_what_is_no_optimizer_is_named(optimizer, words):
    with pytest.raises(TypeError, match=words):
        gs.GradientSplitter(model_for("AdamW"), optimizer=optimizer)


def test_wrappers_stand_for_what_is_inside():
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    model = model_for("AdamW")
    inner = torch.optim.AdamW(model.parameters())
    wrapped = accelerate.optimizer.AcceleratedOptimizer(inner)
    assert gs.GradientSplitter(model, optimizer=wrapped).optimizer is inner
    assert gs.GradientSplitter(model, optimizer=others.Lookahead(inner)).optimizer is inner
    assert gs.GradientSplitter(model, optimizer=schedulefree.ScheduleFreeWrapper(inner)).optimizer is inner
    around = others.SAM(model.parameters(), base_optimizer=torch.optim.AdamW)
    assert type(gs.GradientSplitter(model, optimizer=around).optimizer) is torch.optim.AdamW


def test_the_wrapper_of_lightning_stands_for_what_is_inside():
    module = pytest.importorskip("lightning.pytorch.core.optimizer")
    model = model_for("AdamW")
    inner = torch.optim.AdamW(model.parameters())
    assert gs.GradientSplitter(model, optimizer=module.LightningOptimizer(inner)).optimizer is inner
