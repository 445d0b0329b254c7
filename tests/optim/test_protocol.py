"""GSO as an optimizer among PyTorch's: closures, schedulers, groups, pickling, state dictionaries, what it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import gradsplit as gs
from tests.optim.small import backward, model_of, train


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_an_optimizer_with_torchs_groups_and_names():
    model = model_of()
    optimizer = gs.GSO(model, lr=0.1, direction="adam")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert set(optimizer.defaults) >= {"lr", "betas", "eps", "weight_decay", "maximize"}
    assert "GSO" in repr(optimizer)


@pytest.mark.parametrize(
    "params",
    [
        lambda m: m,
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}],
        lambda m: [{"params": list(m[0].named_parameters(prefix="0"))}, {"params": list(m[2].named_parameters())}],
    ],
    ids=["module", "parameters", "pairs", "groups", "groups of pairs"],
)
def test_parameters_in_every_form_give_the_same_run(params):
    model, other = model_of(), model_of()
    assert_equal(
        train(model, gs.GSO(params(model), lr=0.1, direction="adam"), range(4)),
        train(other, gs.GSO(other, lr=0.1, direction="adam"), range(4)),
    )


def test_frozen_parameters_of_a_module_are_left_out_and_none_is_passed_over():
    model = model_of()
    model[0].weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = gs.GSO(model, lr=0.1, direction="adam")
    backward(model, 0)
    model[2].bias.grad = None
    optimizer.step()
    after = list(model.parameters())
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False, True]
    assert model[2].bias not in optimizer.state


def test_a_step_without_any_gradient_does_nothing():
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = gs.GSO(model, lr=0.1, direction="adam")
    optimizer.step()
    assert_equal(before, model.parameters())
    assert not optimizer.state


def test_a_closure_runs_with_gradients_and_its_loss_is_returned():
    model, other = model_of(), model_of()
    optimizer = gs.GSO(model, lr=0.1, direction="adam")

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        return backward(model, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.detach() == backward(other, 0).detach()
    gs.GSO(other, lr=0.1, direction="adam").step()
    assert_equal(model.parameters(), other.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
    ],
    ids=["cosine", "one cycle", "warm-up"],
)
def test_tau_follows_the_scheduler(make):
    """No row moves by more than 3 % x lr / largest lr so far of its length."""
    model = model_of(torch.float64)
    optimizer = gs.GSO(model, lr=0.5, weight_decay=0.0, direction="adam")
    scheduler, top = make(optimizer), optimizer.param_groups[0].get("initial_lr", 0.0)
    for step in range(9):
        lr = float(optimizer.param_groups[0]["lr"])
        top = max(top, lr)
        before = [p.detach().clone().reshape(p.shape[0], -1) for p in (model[0].weight, model[2].weight)]
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        scheduler.step()
        for old, p in zip(before, (model[0].weight, model[2].weight), strict=True):
            share = (p.detach() - old).norm(dim=1) / old.norm(dim=1)
            assert (share <= 0.03 * lr / top * (1 + 1e-9)).all(), (step, share, lr, top)


def test_hooks_run_around_the_step():
    model, seen = model_of(), []
    optimizer = gs.GSO(model, lr=0.1, direction="adam")
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    backward(model, 0)
    optimizer.step()
    assert seen == ["before", "after"]


OPTIONS = [
    {},
    {"second_moment": "bin"},
    {"budget": (gs.Ema(1.1, warmup=1), gs.Percentile(0.5), gs.RelativeStep())},
    {"plan": "tree_sp", "budget": {"module": gs.Ema(1.5, warmup=1), "bin": gs.RelativeStep()}},
    {"plan": lambda layout: gs.xsp(layout, parts=2)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "bin", "history", "tree", "function"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "state_dict", "file"])
def test_a_copy_goes_on_as_the_original_would(options, way):
    model = model_of()
    optimizer = gs.GSO(model, lr=0.1, **options, direction="adam")
    train(model, optimizer, range(3))
    if way in ("pickle", "deepcopy"):
        # Together, so that the copy of the optimizer holds the copy of the parameters.
        both = (model, optimizer)
        other, copied = pickle.loads(pickle.dumps(both)) if way == "pickle" else copy.deepcopy(both)
    else:
        other = model_of(seed=1)
        other.load_state_dict(model.state_dict())
        copied = gs.GSO(other, lr=3.0, **options, direction="adam")
        state = copy.deepcopy(optimizer.state_dict())  # as in torch, loading shares the tensors
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        copied.load_state_dict(state)
    assert_equal(train(other, copied, range(3, 7)), train(model, optimizer, range(3, 7)))


def test_statistics_a_bin_stay_float32_in_a_bfloat16_model():
    model = model_of(torch.bfloat16)
    optimizer = gs.GSO(model, lr=0.1, second_moment="bin", direction="adam")
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    fresh = gs.GSO(model, lr=0.1, second_moment="bin", direction="adam")
    fresh.load_state_dict(saved)
    for p in model.parameters():
        rows = p.shape[0] if p.dim() > 1 else 1
        assert fresh.state[p]["bin_sq"].dtype == torch.float32
        assert fresh.state[p]["bin_sq"].shape == (rows,)
        assert torch.equal(fresh.state[p]["bin_sq"], optimizer.state[p]["bin_sq"])
        assert fresh.state[p]["bin_sq"] is not optimizer.state[p]["bin_sq"]
        assert fresh.state[p]["exp_avg"].dtype == torch.bfloat16
        assert fresh.state[p]["step"].dtype == torch.float32


def test_a_state_of_an_older_version_is_completed_with_defaults():
    model = model_of()
    optimizer = gs.GSO(model, lr=0.1, direction="adam")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["maximize"]
    fresh = gs.GSO(model, lr=0.1, direction="adam")
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["maximize"] is False
    train(model, fresh, range(1))


def test_a_distributed_checkpoint_fills_a_fresh_optimizer():
    """It makes the state by a step with lr = 0 and gradients of zeros, which must move nothing and teach nothing."""
    model = model_of()
    optimizer = gs.GSO(model, lr=0.1, second_moment="bin", direction="adam")
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = model_of(seed=1)
    other.load_state_dict(model.state_dict())
    fresh = gs.GSO(other, lr=0.1, second_moment="bin", direction="adam")
    set_optimizer_state_dict(other, fresh, saved)
    assert_equal(other.parameters(), model.parameters())
    assert_equal(train(other, fresh, range(3, 6)), train(model, optimizer, range(3, 6)))


def test_a_step_with_a_rate_of_zero_and_no_gradient_moves_nothing():
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = gs.GSO(model, lr=0.0, weight_decay=0.1, direction="adam")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal(before, model.parameters())
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    backward(model, 0)
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_group_may_have_its_own_plan_and_budget():
    model = model_of(torch.float64)
    optimizer = gs.GSO(
        [
            {"params": model[0].named_parameters()},
            {
                "params": [("head.w", model[2].weight), ("head.b", model[2].bias)],
                "plan": "whole",
                "budget": gs.RelativeStep(0.5),
            },
        ],
        lr=10.0,
        weight_decay=0.0,
        direction="adam",
    )
    head = [model[2].weight, model[2].bias]
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    optimizer.step()
    rows = (model[0].weight.detach() - before[0]).norm(dim=1) / before[0].norm(dim=1)
    torch.testing.assert_close(rows, torch.full((6,), 0.03, dtype=torch.float64))
    lengths = [torch.cat([p.detach().reshape(-1) for p in ps]) for ps in (before[2:], head)]
    assert float((lengths[1] - lengths[0]).norm() / lengths[0].norm()) == pytest.approx(0.5)


def test_a_group_added_later_joins_and_the_others_keep_their_history():
    model = model_of()
    optimizer = gs.GSO(
        model[0].named_parameters(prefix="0"),
        lr=0.1,
        budget=(gs.Ema(1.1, warmup=1), gs.RelativeStep()),
        direction="adam",
    )
    train(model, optimizer, range(3))
    history = optimizer.state_dict()["gradsplit"][0]["gradient"]
    optimizer.add_param_group({"params": list(model[2].named_parameters(prefix="2")), "lr": 0.01})
    for key, arrays in optimizer.state_dict()["gradsplit"][0]["gradient"].items():
        assert_equal(arrays, history[key])
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(1))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"expected the state of 2 plans, got 1\. Add the groups of the saved run"):
        optimizer.load_state_dict({**optimizer.state_dict(), "gradsplit": optimizer.state_dict()["gradsplit"][:1]})


def test_a_group_that_cannot_be_added_leaves_the_optimizer_as_it_was():
    model = model_of()
    optimizer = gs.GSO(model[0].named_parameters(prefix="0"), lr=0.1, direction="adam")
    with pytest.raises(ValueError, match="expected one of whole, per_tensor"):
        optimizer.add_param_group({"params": list(model[2].named_parameters(prefix="2")), "plan": "rows"})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(1))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: gs.GSO(m, lr=-1.0, direction="adam"), ValueError, "Invalid learning rate: -1.0"),
        (lambda m: gs.GSO(m, lr=float("nan"), direction="adam"), ValueError, "Invalid learning rate: nan"),
        (lambda m: gs.GSO(m, lr=torch.ones(2), direction="adam"), ValueError, "Tensor lr must be 1-element"),
        (lambda m: gs.GSO(m, eps=-1.0, direction="adam"), ValueError, "Invalid epsilon value: -1.0"),
        (lambda m: gs.GSO(m, weight_decay=-1.0, direction="adam"), ValueError, "Invalid weight_decay value: -1.0"),
        (lambda m: gs.GSO(m, betas=(1.0, 0.9), direction="adam"), ValueError, "Invalid beta parameter at index 0: 1.0"),
        (
            lambda m: gs.GSO(m, betas=(0.9, -0.1), direction="adam"),
            ValueError,
            "Invalid beta parameter at index 1: -0.1",
        ),
        (
            lambda m: gs.GSO(m, second_moment="row", direction="adam"),
            ValueError,
            r"GSO\(second_moment='row'\): expected 'element' or 'bin'",
        ),
        (
            lambda m: gs.GSO(m, second_moment="bin", plan="whole", direction="adam"),
            ValueError,
            r"GSO\(second_moment='bin'\): expected bins inside one tensor each",
        ),
        (
            lambda m: gs.GSO(m, plan="rows", direction="adam"),
            ValueError,
            r"GSO\(plan='rows'\): expected one of whole, per_tensor, xsp",
        ),
        (
            lambda m: gs.GSO(m, budget="emma", direction="adam"),
            ValueError,
            r"GSO\(budget='emma'\): .* Did you mean 'ema'\?",
        ),
        (
            lambda m: gs.GSO(m, rule="best", direction="adam"),
            ValueError,
            r"GSO\(rule='best'\): expected one of bottom_up, nearest",
        ),
        (
            lambda m: gs.GSO(m, backend="fast", direction="adam"),
            ValueError,
            r"GSO\(backend='fast'\): expected 'auto' or one of",
        ),
        (lambda m: gs.GSO([], direction="adam"), ValueError, "empty parameter list"),
        (lambda m: gs.GSO(nn.ReLU(), direction="adam"), ValueError, "empty parameter list"),
        (
            lambda m: gs.GSO(m[0].weight, direction="adam"),
            TypeError,
            "params argument given to the optimizer should be an iterable",
        ),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make(model_of())


def test_a_sparse_gradient_is_refused_before_anything_moves():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = gs.GSO(embedding, lr=0.1, direction="adam")
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"GSO does not support sparse gradients, got one of shape \(5, 2\). Make"):
        optimizer.step()
    assert torch.equal(before, embedding.weight.detach())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            lambda m: gs.GSO(m, plan="per_tensor", direction="adam"),
            "expected the state of plan [0-9a-f]{16}, got that of plan",
        ),
        (
            lambda m: gs.GSO(m, budget=("ema", gs.RelativeStep()), direction="adam"),
            r"expected the history of budgets \[\], got \['bin/ema/0'\]",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(other, words):
    model = model_of()
    optimizer, stranger = gs.GSO(model, lr=0.1, direction="adam"), other(model_of(seed=1))
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(stranger.state_dict())
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("capturable", [False, True])
def test_the_step_counter_counts_and_autograd_knows(capturable):
    w = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = gs.GSO([w], lr=1e-3, capturable=capturable, direction="adam")
    for seen in (1.0, 2.0):
        w.grad = torch.ones(2, 3)
        optimizer.step()
        step = optimizer.state[w]["step"]
        assert step.dtype == torch.float32 and step.item() == seen and step._version >= seen
    optimizer.state[w]["step"] = torch.tensor(5.0, dtype=torch.float64)  # a counter of another kind counts as well
    optimizer.step()
    assert optimizer.state[w]["step"].item() == 6.0
