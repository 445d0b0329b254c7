"""What a run by share saves: taken over whole or not at all, from its own runs and from other optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import gradsplit as gs
from tests.optim.amp_runs import assert_same, snapshot
from tests.optim.share.test_protocol import net_of, train


def copies(seed=1):
    """A trained net and a fresh one."""
    return net_of(), net_of(seed=seed)


def test_groups_added_later_resume_as_groups_of_the_constructor():
    model, other = copies()
    optimizer = gs.GSO([{"params": [model.words.weight]}, {"params": list(model.conv.parameters()), "lr": 0.02}])
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [*model.norm.parameters(), *model.head.parameters()], "lr": 0.01})
    train(model, optimizer, range(2, 5))
    other.load_state_dict(model.state_dict())
    groups = [[other.words.weight], [*other.conv.parameters()], [*other.norm.parameters(), *other.head.parameters()]]
    resumed = gs.GSO([{"params": group} for group in groups])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.03, 0.02, 0.01]
    assert_same(train(other, resumed, range(5, 9)), train(model, optimizer, range(5, 9)))


@pytest.mark.parametrize("empty", [[], [torch.empty(0, 4, requires_grad=True)]], ids=["no tensor", "no elements"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "added later"])
def test_groups_without_elements_save_load_and_step(empty, later):
    runs = []
    for _ in range(2):
        model = net_of()
        groups = [{"params": [*model.parameters()]}, {"params": list(empty)}]
        optimizer = gs.GSO(groups[:1] if later else groups)
        if later:
            optimizer.add_param_group(groups[1])
        runs.append((model, optimizer))
    (model, optimizer), (other, resumed) = runs
    train(model, optimizer, range(2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(train(other, resumed, range(2, 4)), train(model, optimizer, range(2, 4)))


def test_an_optimizer_of_an_empty_tensor_alone_does_nothing():
    w = nn.Parameter(torch.empty(0, 4))
    optimizer = gs.GSO([w])
    w.grad = torch.empty(0, 4)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert w.shape == (0, 4) and optimizer.records == []


def test_frozen_parameters_are_in_the_state_and_thaw_after_it():
    model, other = copies()
    for net in (model, other):
        net.words.weight.requires_grad_(False)
    optimizer = gs.GSO(model)
    train(model, optimizer, range(2))
    other.load_state_dict(model.state_dict())
    resumed = gs.GSO(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net in (model, other):
        net.words.weight.requires_grad_(True)
    assert_same(train(other, resumed, range(2, 5)), train(model, optimizer, range(2, 5)))
    assert not torch.equal(other.words.weight, net_of().words.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_memories_of_half_precision_come_back_in_float32_bit_for_bit(dtype):
    model, other = net_of(dtype), net_of(dtype, seed=1)
    optimizer = gs.GSO(model)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    resumed = gs.GSO(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in other.parameters():
        assert all(value.dtype == torch.float32 for value in resumed.state[p].values())
    assert_same(train(other, resumed, range(3, 6)), train(model, optimizer, range(3, 6)))


def test_a_distributed_checkpoint_goes_on_within_what_history_decides():
    """It makes the state by a step with lr = 0 and gradients of zeros, and keeps no history of norms."""
    model, other = copies()
    optimizer = gs.GSO(model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    fresh = gs.GSO(other)
    set_optimizer_state_dict(other, fresh, saved)
    assert_same(list(other.parameters()), list(model.parameters()))
    assert fresh.param_groups[0]["lr"] == 0.03
    assert_same(train(other, fresh, range(3, 6)), train(model, optimizer, range(3, 6)))


def test_adamws_means_are_taken_over_and_its_rate_is_not():
    model = net_of()
    other = torch.optim.AdamW(model.named_parameters(), lr=1e-3, betas=(0.8, 0.9))
    torch.optim.lr_scheduler.CosineAnnealingLR(other, 10)
    train(model, other, range(3))
    optimizer = gs.GSO(model, lr=0.02, steps=10)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.02 and group["betas"] == (0.9, 0.99) and "initial_lr" not in group
    assert_same(optimizer.state[model.head.weight]["momentum"], other.state[model.head.weight]["exp_avg"])
    assert set(optimizer.state[model.head.weight]) == {"step", "momentum"}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert_same(optimizer.state[model.words.weight][key], other.state[model.words.weight][key])
    before = model.head.weight.detach().clone()
    train(model, optimizer, [3])
    moved = (model.head.weight.detach() - before).norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02), rtol=0.02, atol=0)


def test_muons_means_are_taken_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    other = torch.optim.Muon(model.parameters(), lr=0.5)
    for _ in range(2):
        other.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        other.step()
    optimizer = gs.GSO(model)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.03
    for p in model.parameters():
        assert_same(optimizer.state[p]["momentum"], other.state[p]["momentum_buffer"])
    optimizer.step()


@pytest.mark.parametrize("plan", ["xsp", "per_tensor"])
def test_the_means_of_the_optimizer_before_are_taken_over(plan):
    model = net_of()
    old = gs.GSO(model, lr=3.0, direction="adam", plan=plan)
    train(model, old, range(3))
    optimizer = gs.GSO(model)
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.03 and optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert_same(optimizer.state[model.conv.weight]["momentum"], old.state[model.conv.weight]["exp_avg"])
    assert_same(optimizer.state[model.conv.bias]["exp_avg_sq"], old.state[model.conv.bias]["exp_avg_sq"])
    train(model, optimizer, range(3, 5))


def assert_refused(optimizer, model, state, words):
    """The state is refused, and nothing of it is taken over."""
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(copy.deepcopy(state))
    assert_same(before, snapshot(model, optimizer))
    train(model, optimizer, [9])


STRANGERS = {
    "SGD": (
        lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
        r"expected 'exp_avg' in the state of 'words.weight', whose direction is 'adam', got \['momentum_buffer'",
    ),
    "one second moment per row": (
        lambda m: gs.GSO(m, direction="adam", second_moment="bin"),
        r"expected 'exp_avg_sq' in the state of 'words.weight', whose direction is 'adam', got .*bin_sq",
    ),
    "another direction": (
        lambda m: gs.GSO(m, direction={"words.*": "orthogonal"}),
        r"expected 'exp_avg' in the state of 'words.weight', whose direction is 'adam', got \['momentum', 'step'\]",
    ),
    "another plan": (lambda m: gs.GSO(m, plan="per_tensor"), "expected the state of plan [0-9a-f]{16}, got that of"),
    "another budget": (lambda m: gs.GSO(m, budget="ema"), r"expected the history of budgets \[\], got \['bin/ema/0'\]"),
    "other groups": (
        lambda m: gs.GSO([{"params": [m.words.weight], "direction": "adam"}, {"params": list(m.parameters())[1:]}]),
        "different number of parameter groups",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_state_that_means_something_else_is_refused_whole(name):
    make, words = STRANGERS[name]
    model, other = copies()
    stranger = make(other)
    train(other, stranger, range(2))
    optimizer = gs.GSO(model)
    train(model, optimizer, range(2))
    assert_refused(optimizer, model, stranger.state_dict(), words)


def test_sgds_sums_are_no_means():
    layers = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    other = torch.optim.SGD(layers[0].parameters(), 0.1, momentum=0.9)
    optimizer = gs.GSO(layers[1])
    layers[0](torch.ones(2, 3)).sum().backward()
    other.step()
    with pytest.raises(ValueError, match=r"expected 'momentum' in the state of 'weight'.*momentum_buffer"):
        optimizer.load_state_dict(other.state_dict())


def test_shares_are_no_learning_rates():
    model, other = copies()
    stranger, optimizer = gs.GSO(other), gs.GSO(model, direction="adam")
    train(other, stranger, range(2))
    train(model, optimizer, range(2))
    assert_refused(
        optimizer, model, stranger.state_dict(), "expected the state of a run with direction='adam'.*was a share"
    )


@pytest.mark.parametrize("damage", ["recent", "most", "steps"])
def test_a_damaged_history_is_refused_whole(damage):
    model, other = copies()
    optimizer, saved = gs.GSO(model), gs.GSO(other)
    train(other, saved, range(2))
    train(model, optimizer, range(2))
    for wrong in (torch.full((), float("nan")), torch.full((), -1.0), torch.ones(3)):
        state = copy.deepcopy(saved.state_dict())
        share = state["gradsplit"][0]["share"]
        share[damage] = torch.broadcast_to(wrong, share[damage].shape) if wrong.dim() == 0 else wrong
        assert_refused(optimizer, model, state, f"expected .* numbers >= 0 at '{damage}', got shape")


def test_a_loss_may_be_resumed_at_every_step():
    """As a guard does: forward, saved, on, back, on again."""
    model = net_of()
    optimizer = gs.GSO(model, steps=20)
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = train(model, optimizer, range(3, 6))
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    assert_same(first, train(model, optimizer, range(3, 6)))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("way", ["cast", "loaded"])
def test_a_model_of_another_dtype_goes_on_with_its_memories(way, backend):
    """float32 for three steps, then float64: close to float64 throughout, and memories of the new dtype."""
    straight = net_of(torch.float64)
    train(straight, gs.GSO(straight, backend=backend), range(6))
    model = net_of().double().float()
    optimizer = gs.GSO(model, backend=backend)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    model.double()
    if way == "loaded":
        optimizer = gs.GSO(model, backend=backend)
        optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert {value.dtype for key, value in optimizer.state[p].items() if key != "step"} == {torch.float64}
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def test_memories_in_half_precision_become_float32():
    model, other = net_of(torch.bfloat16), net_of(torch.bfloat16)
    before = torch.optim.AdamW(model.parameters())
    train(model, before, range(2))
    optimizer = gs.GSO(other)
    optimizer.load_state_dict(before.state_dict())
    assert all(value.dtype == torch.float32 for p in other.parameters() for value in optimizer.state[p].values())
    train(other, optimizer, range(2, 4))
