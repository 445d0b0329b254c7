"""Bad input of GSO by share: each is named with the place and the remedy, and nothing is half-applied."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.optim.directions import DIRECTIONS, Direction, register
from tests.optim.amp_runs import assert_same, snapshot
from tests.optim.share.test_protocol import loss_of, net_of, train


def blocks_of_a_stranger(model):
    return gs.xsp(gs.layout_of(nn.ModuleDict({"head": nn.Linear(5, 9)})), parts=3)


CASES = {
    "a share above one half": (
        lambda m: gs.GSO(m, lr=0.6),
        r"GSO\(lr=0.6\): expected a share of a row's length per step, at most 0.5. The default is 0.03; use direction=",
    ),
    "a negative share": (lambda m: gs.GSO(m, lr=-0.1), "Invalid learning rate: -0.1"),
    "no number": (lambda m: gs.GSO(m, lr=float("nan")), "Invalid learning rate: nan"),
    "a share above one half in a group": (
        lambda m: gs.GSO([{"params": [m.head.weight], "lr": 3.0}]),
        r"GSO\(lr=3.0\): expected a share",
    ),
    "no steps": (
        lambda m: gs.GSO(m, steps=0),
        r"GSO\(steps=0\): expected the number of steps of the run, >= 1, or None",
    ),
    "steps below zero": (lambda m: gs.GSO(m, steps=-3), r"GSO\(steps=-3\): expected the number of steps"),
    "steps that are none": (lambda m: gs.GSO(m, steps=True), r"GSO\(steps=True\): expected the number of steps"),
    "half a step": (lambda m: gs.GSO(m, steps=2.5), r"GSO\(steps=2.5\): expected the number of steps"),
    "an unknown direction": (
        lambda m: gs.GSO(m, direction="muon"),
        r"GSO\(direction='muon'\): expected one of auto, orthogonal, adam for 'words.weight'. Register a direction",
    ),
    "an unknown direction in a mapping": (
        lambda m: gs.GSO(m, direction={"head.*": "lion"}),
        r"GSO\(direction='lion'\): expected one of auto, orthogonal, adam for 'head.weight'",
    ),
    "a direction that is none": (
        lambda m: gs.GSO(m, direction=lambda name, p: 3),
        r"GSO\(direction=3\): expected one of auto, orthogonal, adam for 'words.weight'",
    ),
    "a direction of no kind": (
        lambda m: gs.GSO(m, direction=3),
        r"GSO\(direction=3\): expected 'auto', a direction's name, a mapping or a function",
    ),
    "a direction without a rule": (
        lambda m: gs.GSO(m, direction="orthogonal"),
        r"GSO\(direction='orthogonal'\): expected a tensor with two dimensions or more, got 'conv.bias' of shape",
    ),
    "a pattern that matches nothing": (
        lambda m: gs.GSO(m, direction={"heads.*": "adam"}),
        r"GSO\(direction=\{'heads.\*': …\}\): expected a pattern that matches a parameter, .* not 'words.weight'",
    ),
    "blocks that match nothing": (
        lambda m: gs.GSO(m, blocks={"qkv": 3}),
        r"GSO\(blocks=\{'qkv': …\}\): expected a pattern that matches a parameter",
    ),
    "blocks that do not divide": (
        lambda m: gs.GSO(m, blocks={"head.weight": 4}),
        r"GSO\(blocks=.*4.*\): expected a number that divides the 9 rows of 'head.weight'",
    ),
    "no block": (lambda m: gs.GSO(m, blocks={"head.weight": 0}), r"expected a number that divides the 9 rows"),
    "blocks that are no number": (lambda m: gs.GSO(m, blocks={"head.weight": True}), "expected a number that divides"),
    "blocks of no kind": (
        lambda m: gs.GSO(m, blocks=3),
        r"GSO\(blocks=3\): expected a plan, or a mapping from name patterns to numbers",
    ),
    "blocks over several tensors": (
        lambda m: gs.GSO(m, blocks=gs.whole(gs.layout_of(m))),
        r"GSO\(blocks=.*\): expected bins inside one tensor each, got a bin of 'words.weight' and another tensor",
    ),
    "blocks of another model": (
        lambda m: gs.GSO(m, blocks=blocks_of_a_stranger(m)),
        r"expected a plan of this model, got \(9, 5\) for 'head.weight', which is seen as 9 x 6 here",
    ),
    "blocks of no model": (
        lambda m: gs.GSO(m, blocks=gs.xsp(gs.layout_of(nn.Linear(2, 2)))),
        r"GSO\(blocks=.*\): expected a plan of this model, got one without any of its 7 tensors",
    ),
    "bins over several tensors": (
        lambda m: gs.GSO(m, plan="whole"),
        r"GSO\(plan=…\): expected bins inside one tensor each.*Use a plan by rows or tensors, or direction='adam'",
    ),
    "a budget of updates": (
        lambda m: gs.GSO(m, budget=gs.RelativeStep(0.03)),
        r"GSO\(budget=…\): expected budgets of gradients, got RelativeStep.* every row moves by its share",
    ),
    "one second moment per row": (
        lambda m: gs.GSO(m, second_moment="bin"),
        r"GSO\(second_moment='bin'\): expected 'element'.*Use direction='adam'",
    ),
    "a differentiable step": (
        lambda m: gs.GSO(m, differentiable=True),
        r"GSO\(differentiable=True\): expected direction='adam'",
    ),
    "steps of the optimizer before": (
        lambda m: gs.GSO(m, direction="adam", steps=10),
        r"GSO\(direction='adam', …\): expected neither steps= nor blocks=",
    ),
    "blocks of the optimizer before": (
        lambda m: gs.GSO(m, direction="adam", blocks={"head.weight": 3}),
        r"GSO\(direction='adam', …\): expected neither steps= nor blocks=",
    ),
    "a share in quotes": (lambda m: gs.GSO(m, lr="0.03"), r"GSO\(lr='0.03'\): expected a number, got str"),
    "a tensor above one half": (lambda m: gs.GSO(m, lr=torch.tensor(3.0)), r"GSO\(lr=3.0\): expected a share of a row"),
    "no decay": (lambda m: gs.GSO(m, weight_decay=None), r"GSO\(weight_decay=None\): expected a number, got NoneType"),
    "one beta": (lambda m: gs.GSO(m, betas=0.9), r"GSO\(betas=0.9\): expected two numbers in \[0, 1\)"),
    "three betas": (lambda m: gs.GSO(m, betas=(0.9, 0.9, 0.9)), r"GSO\(betas=.*\): expected two numbers"),
    "betas in quotes": (lambda m: gs.GSO(m, betas=("a", "b")), r"GSO\(betas=\('a', 'b'\)\): expected two numbers"),
    "a sink that is none": (lambda m: gs.GSO(m, sinks=[3]), r"GSO\(sinks=\[3\]\): expected functions of a record in a"),
    "a sink without its list": (lambda m: gs.GSO(m, sinks=print), r"GSO\(sinks=<built-in function print>\): expected"),
    "a pattern that is none": (
        lambda m: gs.GSO(m, direction={3: "adam"}),
        r"GSO\(direction=\{3: …\}\): expected name patterns, got int. Write for example \{'\*.weight': 'adam'\}",
    ),
    "betas": (lambda m: gs.GSO(m, betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named(name):
    make, words = CASES[name]
    with pytest.raises(ValueError, match=words) as caught:
        make(net_of())
    assert "\n" not in str(caught.value)


GROUPS = {
    "a share above one half": ({"lr": 0.7}, r"GSO\(lr=0.7\): expected a share"),
    "an unknown direction": ({"direction": "muon"}, r"GSO\(direction='muon'\): expected one of auto"),
    "a direction without a rule": ({"direction": "orthogonal"}, "expected a tensor with two dimensions or more"),
    "a pattern that matches nothing": ({"direction": {"x": "adam"}}, "expected a pattern that matches a parameter"),
    "bins over several tensors": ({"plan": "whole"}, "expected bins inside one tensor each"),
    "a budget of updates": ({"budget": gs.RelativeStep()}, "expected budgets of gradients"),
    "no kind of direction": ({"direction": 3}, "expected 'auto', a direction's name"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_that_cannot_be_added_leaves_everything_as_it_was(name):
    options, words = GROUPS[name]
    model = net_of()
    optimizer = gs.GSO([*model.words.parameters(), *model.conv.parameters(), *model.norm.parameters()])
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": list(model.head.parameters()), **options})
    assert_same(before, snapshot(model, optimizer))
    assert len(optimizer._kinds) == len(optimizer._overrides) == len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": list(model.head.parameters())})
    train(model, optimizer, [2])


def test_a_share_that_a_scheduler_drives_beyond_one_half_is_refused_before_anything_moves():
    model = net_of()
    optimizer = gs.GSO(model)
    optimizer.param_groups[0]["lr"] = 0.8
    before = snapshot(model, optimizer)[0]
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"GSO\(lr=0.8\): expected a share"):
        optimizer.step()
    optimizer.zero_grad()
    assert_same(before, snapshot(model, optimizer)[0])
    assert not optimizer.state
    inside = gs.GSO(model, in_backward=True)
    inside.param_groups[0]["lr"] = 0.8
    with pytest.raises(ValueError, match=r"GSO\(lr=0.8\): expected a share"):
        loss_of(model, 0).backward()
    assert_same(before, snapshot(model, optimizer)[0])


def test_a_sparse_gradient_is_refused_before_anything_moves():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = gs.GSO(embedding)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"GSO does not support sparse gradients, got one of shape \(5, 2\)"):
        optimizer.step()
    assert torch.equal(before, embedding.weight.detach())
    assert not optimizer.state


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 3)])
def test_a_tensor_with_an_empty_side_is_passed_over(shape):
    model = net_of()
    model.none = nn.Parameter(torch.empty(shape))
    optimizer = gs.GSO(model)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        model.none.grad = torch.empty(shape)
        optimizer.step()
    other = net_of()
    assert_same(list(model.parameters())[1:], train(other, gs.GSO(other), range(2)))


def test_patterns_and_plans_may_name_tensors_of_any_group():
    model = net_of()
    groups = [{"params": list(part.named_parameters(prefix))} for prefix, part in model.named_children()]
    plan = gs.xsp(gs.layout_of(model), parts=3)
    for blocks in ({"head.weight": 3}, plan):
        optimizer = gs.GSO(groups, direction={"head.bias": "adam", "words.*": "adam"}, blocks=blocks)
        assert optimizer._kinds[0][0].direction == "adam"
        assert max(optimizer._kinds[-1][0].blocks, len(optimizer._kinds[-1][0].boxes)) == 3


def test_nothing_can_be_registered_twice_or_as_auto():
    class Auto(Direction):
        name, memory = "auto", ()

        def turn(self, turns):
            return []

    with pytest.raises(ValueError, match=r"register\(Auto\(\)\): expected a new name, got 'auto'"):
        register(Auto())


class Odd(Direction):
    """Momentum, but for what a test plants."""

    name, memory = "odd, of a test", ("momentum",)
    fault = staticmethod(lambda made: made)

    def turn(self, turns):
        for turn in turns:
            turn.state["momentum"].add_(turn.gradient)
        return self.fault([turn.state["momentum"].clone() for turn in turns])


@pytest.fixture
def odd(monkeypatch):
    register(Odd())
    yield monkeypatch
    del DIRECTIONS[Odd.name]


def _raises(made):
    raise ZeroDivisionError("inside the direction")


WRONG = {
    "another shape": (
        lambda made: [made[0], made[1].mT],
        r"GSO\(direction='odd, of a test'\): expected a direction of shape \(1, 6, 8\) for 'conv.weight', got shape "
        r"\(1, 8, 6\). Return it like turn.gradient; nothing has moved",
    ),
    "one too few": (
        lambda made: made[:1],
        "expected one direction per turn, 2 of them from 'words.weight' on, got 1",
    ),
    "none at all": (lambda made: None, "expected one direction per turn, 2 of them from .*, got NoneType"),
    "no tensor": (lambda made: [made[0], 3.0], "of shape .* for 'conv.weight', got float"),
    "an error of its own": (_raises, "inside the direction"),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("budget", [None, gs.Ema(1.5)], ids=str)
def test_a_direction_from_outside_that_does_not_fit_leaves_everything_as_it_was(odd, fault, budget):
    make, words = WRONG[fault]
    model = net_of()
    chosen = {"words.weight": Odd.name, "conv.weight": Odd.name}
    optimizer = gs.GSO(model, direction=chosen, budget=budget)
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    before = snapshot(model, optimizer)
    odd.setattr(Odd, "fault", staticmethod(make))
    with pytest.raises((ValueError, ZeroDivisionError), match=words):
        optimizer.step()
    assert_same(before, snapshot(model, optimizer))
    odd.setattr(Odd, "fault", staticmethod(lambda made: made))
    optimizer.step()
    assert not torch.equal(before[0][-2], model.head.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_whose_direction_is_not_finite_stays_as_it_was_and_is_named(odd, bad):
    def spoilt(made):
        made[1][0, 2, 3] = bad
        return made

    models = [net_of() for _ in range(2)]
    optimizers = [gs.GSO(m, direction={"words.weight": Odd.name, "conv.weight": Odd.name}, fused=False) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        loss_of(model, 2).backward()
    before = [t[2].clone() for t in (models[1].conv.weight, optimizers[1].state[models[1].conv.weight]["momentum"])]
    optimizers[0].step()
    odd.setattr(Odd, "fault", staticmethod(spoilt))
    with pytest.warns(
        UserWarning, match=r"got inf or nan for 'conv.weight\[2:3\]' and 0 more rows in step 2. They stay"
    ):
        optimizers[1].step()
    assert not optimizers[1].records[0].moved_B.all()
    optimizers[1].step()  # a second warning for the same tensor would be an error
    odd.setattr(Odd, "fault", staticmethod(lambda made: made))
    optimizers[0].step()
    after = [t[2] for t in (models[1].conv.weight, optimizers[1].state[models[1].conv.weight]["momentum"])]
    assert_same(before, [t.detach() for t in after])
    for name, p in models[0].named_parameters():
        rest = [i for i in range(len(p)) if name != "conv.weight" or i != 2]
        assert torch.equal(p[rest], dict(models[1].named_parameters())[name][rest]), name


def _without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def _spoilt(key, value):
    def spoil(state):
        return {**state, "state": {**state["state"], 5: {**state["state"][5], key: value(state["state"][5][key])}}}

    return spoil


STATES = {
    "nothing": (
        lambda state: None,
        "expected what state_dict.. returned, with .*, got NoneType",
    ),
    "no groups": (_without("param_groups"), r"got a mapping with \['gradsplit', 'gradsplit_count', 'state'\]"),
    "a count that is none": (lambda state: {**state, "gradsplit_count": "x"}, "got gradsplit_count='x'"),
    "a negative count": (
        lambda state: {**state, "gradsplit_count": -5},
        "got gradsplit_count=-5. The state",
    ),
    "a memory of another shape": (
        _spoilt("momentum", lambda old: old[:4]),
        r"expected memories of shape \(9, 6\) for 'head.weight', got 'momentum' of shape \(4, 6\)",
    ),
    "a memory in a list": (
        _spoilt("momentum", lambda old: old.tolist()),
        "expected a tensor at 'momentum' of 'head.weight', got list. The state is damaged",
    ),
    "a step in words": (_spoilt("step", lambda old: "x"), "a count of steps for 'head.weight', got step='x'"),
    "memories under other keys": (
        lambda state: {**state, "state": {f"p{i}": memory for i, memory in state["state"].items()}},
        r"expected memories of the parameters that 'param_groups' lists, \[0, 1, 2\] .* and some of 'p0'",
    ),
    "no history": (
        lambda state: {**state, "gradsplit": [None]},
        r"a mapping per plan at 'gradsplit', got \['NoneType'\]",
    ),
    "a history in words": (
        lambda state: {**state, "gradsplit": [{**state["gradsplit"][0], "share": "x"}]},
        r"expected a mapping per plan at 'gradsplit', got \['dict'\]",
    ),
    "a share above one half": (
        lambda state: {**state, "param_groups": [{**state["param_groups"][0], "lr": 7.0}]},
        r"constants that GSO takes in group 0, got others \(GSO\(lr=7.0\): expected a share .*\). Correct them",
    ),
    "a share in quotes": (
        lambda state: {**state, "param_groups": [{**state["param_groups"][0], "lr": "0.03"}]},
        r"constants that GSO takes in group 0, got others \(GSO\(lr='0.03'\): expected a number, got str",
    ),
    "a memory with nan": (
        _spoilt("momentum", lambda old: old * float("nan")),
        "expected finite memories, got inf or nan in 'momentum' of 'head.weight'. Such a row would never move again",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_does_not_fit_names_the_tensor_and_changes_nothing(name):
    spoil, words = STATES[name]
    model = net_of()
    optimizer = gs.GSO(model)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"GSO.load_state_dict\(…\): .*" + words):
        optimizer.load_state_dict(spoil(optimizer.state_dict()))
    assert_same(before, snapshot(model, optimizer))


def test_the_state_of_fewer_parameters_is_refused_in_our_words():
    model = net_of()
    optimizer = gs.GSO(model)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match=r"expected the state of 2 parameters, got that of 7\. Make GSO with"):
        gs.GSO(model.head).load_state_dict(optimizer.state_dict())


def test_groups_without_names_and_modules_join_an_optimizer_that_was_given_a_module():
    model, more = net_of(), nn.Embedding(5, 3)
    optimizer = gs.GSO(model.words)
    optimizer.add_param_group({"params": list(model.conv.parameters())})
    optimizer.add_param_group({"params": model.head.weight})
    optimizer.add_param_group({"params": []})
    optimizer.add_param_group({"params": more})
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == ["weight", "group1.param0", "group1.param1", "group2.param0", "weight"]
    assert [kind.name for kinds in optimizer._kinds for kind in kinds] == [
        *("embedding", "matrix", "vector", "matrix", "embedding")
    ]
    loss_of(model, 0).backward()
    more(torch.tensor([1])).sum().backward()
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_number_of_steps_may_come_from_numpy():
    assert gs.GSO(net_of(), steps=np.int64(5))._clock.pace() == 1.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, r"GSO\(NoneType\): expected a module, parameters, pairs .* Write for example GSO\(model\)"),
        (nn.Linear, r"GSO\(the class Linear\): expected a module"),
        (
            [{"param": []}],
            r"add_param_group\(dict\): expected a mapping with 'params', got the keys \['param'\]. Write",
        ),
    ],
)
def test_what_holds_no_parameters_is_named(given, words):
    with pytest.raises(TypeError, match=words):
        gs.GSO(given)


def test_a_group_that_is_no_mapping_is_refused_and_one_tensor_is_taken():
    model = net_of()
    optimizer = gs.GSO(model.head)
    with pytest.raises(TypeError, match=r"add_param_group\(list\): expected a mapping with 'params', got none. Write"):
        optimizer.add_param_group([model.words.weight])
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model.words.weight})
    assert [p is model.words.weight for p in optimizer.param_groups[1]["params"]] == [True]


def test_the_warning_of_the_end_points_at_the_users_line():
    model = net_of()
    optimizer = gs.GSO(model, steps=1)
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    with pytest.warns(UserWarning, match=r"GSO\(steps=1\): step 1 is beyond the end of the run") as told:
        optimizer.step()
    assert [one.filename for one in told] == [__file__]


def test_parameters_that_to_empty_has_replaced_are_told_of():
    model = nn.Linear(3, 2, device="meta")
    optimizer = gs.GSO(model)
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match=r"'weight' and others lie on the meta device and have no gradient.*make GSO"):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"direction": "adam"}, {"backend": "eager"}, {"in_backward": True}], ids=str)
def test_a_parameter_of_another_shape_is_refused_before_any_memory_is_read(options):
    weights = [nn.Parameter(torch.ones(20, 3)), nn.Parameter(torch.ones(20, 3))]
    groups = [{"params": [("first", weights[0])]}, {"params": [("second", weights[1])]}]
    optimizer = gs.GSO(groups, **options)
    for step in range(2):
        if step:
            weights[1].data = torch.ones(4, 3)
            before = weights[0].detach().clone()
            words = (
                r"GSO.step\(\): expected 'second' as it was when GSO was made, \(20, 3\), got \(4, 3\). Make a new GSO"
            )
            with pytest.raises(ValueError, match=words):
                sum(w.square().sum() for w in weights).backward()
                optimizer.step()
            assert torch.equal(weights[1], torch.ones(4, 3))
            assert options.get("in_backward") or torch.equal(weights[0], before)
        else:
            sum(w.square().sum() for w in weights).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_scheduler_that_leaves_no_mark_beside_steps_is_named_once():
    model = net_of()
    optimizer = gs.GSO(model, steps=20)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    train(model, optimizer, range(2))
    for loss in (1.0, 1.0):
        scheduler.step(loss)
    with pytest.warns(UserWarning, match=r"GSO\(steps=20\): expected lr to stay as it was, 0.03, got 0.015") as told:
        train(model, optimizer, range(1))
    assert len(told) == 1
    scheduler.step(1.0)
    train(model, optimizer, range(1))


@pytest.mark.parametrize("change", ["a guard", "a loaded state", "no steps", "a group"])
def test_a_share_that_others_may_change_beside_steps_says_nothing(change):
    model = net_of()
    optimizer = gs.GSO(model, steps=None if change == "no steps" else 20)
    guard = gs.Guard(model, optimizer) if change == "a guard" else None
    train(model, optimizer, range(1))
    if guard is not None:
        guard._rate.factor = 0.5
    elif change == "a loaded state":
        other = gs.GSO(net_of(), lr=0.01, steps=20)
        optimizer.load_state_dict(other.state_dict())
    elif change == "a group":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.01})
    else:
        optimizer.param_groups[0]["lr"] = 0.01
    with warnings.catch_warnings(record=True) as told:
        train(model, optimizer, range(2))
    assert not told


def test_constants_are_refused_before_parameters_as_by_torch():
    """PyTorch's own tests of errors pass None for the parameters."""
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 0: 1\.0"):
        gs.GSO(None, betas=(1.0, 0.9))
    with pytest.raises(TypeError, match=r"GSO\(NoneType\): expected a module"):
        gs.GSO(None)


def test_fused_on_the_meta_device_is_refused_by_the_step():
    model = nn.Linear(3, 2, device="meta")
    optimizer = gs.GSO(model, fused=True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params"):
        optimizer.step()
