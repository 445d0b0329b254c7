"""Every refusal of the splitter: what it says, and that nothing is half-applied."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.plan import Layout, Plan


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


OTHER = gs.xsp(Layout.from_shapes({"w": (3, 2)}))


def on_two_devices():
    model = model_of()
    model[1].to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda m: gs.GradientSplitter(m, "xps"),
            ValueError,
            r"GradientSplitter\(plan='xps'\): .* Did you mean 'xsp'\?",
        ),
        (
            lambda m: gs.GradientSplitter(m, OTHER),
            ValueError,
            r"GradientSplitter\(plan=…\): expected a plan of this model",
        ),
        (lambda m: gs.GradientSplitter(m, 3), TypeError, r"GradientSplitter\(plan=…\): expected a Plan, .* got int"),
        (
            lambda m: gs.GradientSplitter(m, budget="fxed"),
            ValueError,
            r"GradientSplitter\(budget='fxed'\): .* Did you mean 'fixed'\?",
        ),
        (
            lambda m: gs.GradientSplitter(m, budget=gs.Fixed([1.0, 2.0])),
            ValueError,
            r"GradientSplitter\(budget=\{'bin': Fixed\(…\)\}\): .* shape \(8,\), got shape \(2,\)",
        ),
        (
            lambda m: gs.GradientSplitter(m, budget={"module": gs.Fixed(1.0)}),
            ValueError,
            "expected a plan with nodes at level 'module'",
        ),
        (
            lambda m: gs.GradientSplitter(m, budget=gs.Fixed(1.0), rule="best"),
            ValueError,
            r"GradientSplitter\(rule='best'\): expected one of bottom_up, nearest",
        ),
        (
            lambda m: gs.GradientSplitter(m, backend="fast"),
            ValueError,
            r"GradientSplitter\(backend='fast'\): expected 'auto' or one of .*eager, .*reference",
        ),
        (
            lambda m: gs.GradientSplitter(m, on_nonfinite="skip"),
            ValueError,
            r"GradientSplitter\(on_nonfinite='skip'\): expected 'zero' or 'raise'",
        ),
        (
            lambda m: gs.GradientSplitter(m, step="share"),
            ValueError,
            r"GradientSplitter\(step='share', cap_updates=False\): expected 'cap', or 'share' with cap_updates=True",
        ),
        (
            lambda m: gs.GradientSplitter(
                m, "per_tensor", {"tensor": gs.RelativeStep()}, cap_updates=True, step="share"
            ),
            ValueError,
            r"GradientSplitter\(step='share'\): expected a bound on the step of every bin, got one at level 'tensor'",
        ),
        (lambda m: gs.GradientSplitter(nn.ReLU()), ValueError, "expected parameters, got none from the ReLU"),
        (lambda m: gs.GradientSplitter(m.requires_grad_(False)), ValueError, "got 4 frozen ones from the Sequential"),
        (lambda m: gs.GradientSplitter(m.parameters()), TypeError, "Pass model.named_parameters"),
        (
            lambda m: gs.GradientSplitter(on_two_devices()),
            ValueError,
            "all parameters on one device, got '0.weight' on cpu and '1.weight' on meta. Make one splitter per device",
        ),
        (
            lambda m: gs.GradientSplitter(m, budget="relative_step", optimizer=torch.optim.Adam(m.parameters())),
            ValueError,
            r"GradientSplitter\(optimizer=Adam\): RelativeStep bounds the step.*Leave budget= out.*cap_updates=True",
        ),
        (
            lambda m: gs.GradientSplitter(m, budget=gs.RelativeStep()).attach(torch.optim.AdamW(m.parameters())),
            ValueError,
            r"GradientSplitter\(optimizer=AdamW\): RelativeStep bounds the step",
        ),
        (
            lambda m: gs.GradientSplitter(m, optimizer=torch.optim.SGD(m[0].parameters(), lr=0.1)),
            ValueError,
            "expected an optimizer of this model's parameters, got one without '1.weight' and 1 more",
        ),
        (
            lambda m: gs.GradientSplitter(m).step(),
            ValueError,
            r"step\(\): RelativeStep needs the learning rate. Pass optimizer=…, or attach\(optimizer\)",
        ),
        (
            lambda m: gs.GradientSplitter(m, budget=gs.Fixed(1.0)).calibrate(lambda: None, 0),
            ValueError,
            r"calibrate\(steps=0\): expected at least one backward pass",
        ),
        (
            lambda m: gs.GradientSplitter(None),
            TypeError,
            r"GradientSplitter\(…\): expected a model or pairs \(name, parameter\), got NoneType. Pass the model",
        ),
        (lambda m: gs.GradientSplitter(nn.Linear), TypeError, r"GradientSplitter\(…\): .* got the class Linear"),
        (
            lambda m: gs.GradientSplitter(m, sinks=print),
            ValueError,
            r"GradientSplitter\(sinks=<built-in function print>\): expected functions .* Write sinks=\[print\]",
        ),
        (
            lambda m: gs.GradientSplitter(m, sinks=[3]),
            ValueError,
            r"GradientSplitter\(sinks=\[3\]\): expected functions",
        ),
        (
            lambda m: gs.GradientSplitter(m, collective="yes"),
            ValueError,
            r"GradientSplitter\(collective='yes'\): expected True, False or None",
        ),
        (
            lambda m: gs.GradientSplitter(m, budget=gs.Fixed(1.0), cap_updates=True),
            ValueError,
            r"cap_updates=True, budget=Fixed\(limit=1.0\)\): expected a budget that bounds the update, got none",
        ),
        (
            lambda m: gs.GSO([torch.zeros(3, dtype=torch.int64)], direction="adam"),
            TypeError,
            r"GSO\(…\): expected floating-point parameters, got torch.int64 at 'group0.param0'. Leave it out",
        ),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make(model_of())


def run_of(budget, strategy="xsp", steps=4):
    model = model_of()
    splitter = gs.GradientSplitter(model, strategy, budget)
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 1.0 + i + step)
        splitter.step()
    return splitter


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {}, r"expected what state_dict\(\) returned, got a mapping without \['fingerprint', 'history'"),
        (
            lambda s: run_of("ema", "per_tensor").state_dict(),
            "expected the state of plan [0-9a-f]{16}, got that of plan [0-9a-f]{16}. Make the splitter with the model",
        ),
        (lambda s: run_of("zscore").state_dict(), r"history of budgets \['bin/ema/0'\], got \['bin/zscore/0'\]"),
        (
            lambda s: {**s, "history": {"bin/ema/0": [a[:3] for a in s["history"]["bin/ema/0"]]}},
            r"expected vectors of shape \(8,\) at 'bin/ema/0'",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, words):
    splitter, saved = run_of("ema", steps=7), run_of("ema").state_dict()
    before = copy.deepcopy(splitter.state_dict())
    with pytest.raises(ValueError, match=words):
        splitter.load_state_dict(change(saved))
    after = splitter.state_dict()
    assert {k: v for k, v in after.items() if k != "history"} == {k: v for k, v in before.items() if k != "history"}
    for key, arrays in after["history"].items():
        assert all(torch.equal(a, b) for a, b in zip(arrays, before["history"][key], strict=True))


def test_a_calibrated_state_that_does_not_fit_leaves_the_plan_too():
    """The plan comes with the state; if the history then does not fit, the old plan must still be in force."""
    splitter = run_of("ema", "lbf")
    plan, state = splitter.plan, run_of("zscore", "lbf").state_dict()
    shapes = {name: tuple(p.shape) for name, p in model_of().named_parameters()}
    state["plan"] = gs.xsp(Layout.from_shapes(shapes)).to_dict()
    state["fingerprint"] = Plan.from_dict(state["plan"]).fingerprint
    with pytest.raises(ValueError, match="expected the history of budgets"):
        splitter.load_state_dict(state)
    assert splitter.plan is plan
    assert len(splitter.kernel.squares([None] * 4)) == plan.num_bins


def test_a_plan_of_another_model_inside_a_state_is_refused():
    state = run_of("ema", "lbf").state_dict()
    state["plan"] = OTHER.to_dict()
    with pytest.raises(ValueError, match="expected a plan of this model"):
        run_of("ema", "lbf").load_state_dict(state)


def test_a_gradient_of_stored_entries_instead_of_rows_is_named():
    pairs = [("w", nn.Parameter(torch.zeros(4, 3)))]
    pairs[0][1].grad = torch.eye(4)[:, :3].to_sparse()
    with pytest.raises(ValueError, match=r"expected a dense gradient or one of stored rows, got .* at 'w'. Set"):
        gs.GradientSplitter(pairs, "xsp", gs.Fixed(1.0)).step()


def test_a_cap_on_updates_that_nobody_attached_is_refused():
    model = model_of()
    splitter = gs.GradientSplitter(model, cap_updates=True, optimizer=torch.optim.Adam(model.parameters()))
    splitter.attach(splitter.optimizer).remove()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    splitter.step()
    with pytest.raises(ValueError, match=r"cap_updates=True bounds the step after .* Call attach\(optimizer\) once"):
        splitter.step()


def test_a_limit_that_can_never_bind_is_warned_of_at_the_users_line():
    with pytest.warns(UserWarning, match="the limit 9 of 'all' can never bind"):
        gs.GradientSplitter(model_of(), "xsp", {"root": gs.Fixed(9.0), "bin": gs.Fixed(1.0)})


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_an_expanded_gradient_is_named(backend):
    model = model_of()
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1e-3), backend=backend)
    model[1].weight.grad = torch.ones(1, 4).expand(2, 4)
    with (
        pytest.warns() if backend == "auto" else contextlib.nullcontext(),
        pytest.raises(RuntimeError, match=r"an expanded one at '1\.weight'\. Set parameter\.grad = .*clone\(\) first"),
    ):
        splitter.step()


def test_in_front_of_gso_the_description_says_that_bounds_hold_twice():
    model = model_of()
    with pytest.warns(UserWarning, match="limits hold twice"):
        said = gs.GradientSplitter(model, optimizer=gs.GSO(model)).describe()
    assert "GSO bounds gradients itself, so they are bounded twice" in said
    assert "bounded twice" not in gs.GradientSplitter(model, optimizer=torch.optim.AdamW(model.parameters())).describe()


@pytest.mark.parametrize("option", ["process_group", "stages"])
def test_what_is_no_process_group_is_refused_at_once(option):
    said = rf"{option}=3\): expected a process group of torch.distributed with this rank in it, or None, got int"
    with pytest.raises(ValueError, match=r"GSO\(" + said):
        gs.GSO(model_of(), **{option: 3})
    with pytest.raises(ValueError, match=r"GradientSplitter\(" + said):
        gs.GradientSplitter(model_of(), **{option: 3})
