"""What every share step must do. The subject is a function (model, **options) -> optimizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs
from tests.optim.share.oracle import SHARE
from tests.optim.share.zoo import SHEETS, assert_follows, follow, give, gradient_of, oracle_of, zoo

Make = Callable[..., Any]

BAD = (float("nan"), float("inf"), -float("inf"))


def rows_of(name: str, tensor: Tensor) -> Tensor:
    """The tensor as the share step sees it; complex numbers as pairs."""
    sheet = SHEETS[name]
    tensor = tensor.detach()
    if tensor.is_complex():
        return torch.view_as_real(tensor.contiguous()).reshape(sheet.rows, 2 * sheet.cols)
    return tensor.reshape(sheet.rows, sheet.cols)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: rows_of(name, p).clone() for name, p in model.named_parameters()}


def memory_of(optimizer: Any, model: nn.Module, name: str) -> dict[str, Tensor]:
    p = dict(model.named_parameters())[name]
    kept = {key: value for key, value in optimizer.state[p].items() if key != "step"}
    return {key: rows_of(name, value).clone() for key, value in kept.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], but: str = "") -> None:
    """Equal bit for bit, all tensors but one."""
    assert a.keys() == b.keys()
    for name in a:
        assert name == but or torch.equal(a[name], b[name]), f"{name} differs"


def check_follows_the_formulas(make: Make) -> None:
    """The weights are those of the oracle."""
    model = zoo()
    optimizer, oracle = make(model), oracle_of(model, SHEETS)
    for step in range(5):
        give(model, step, size=300.0 if step == 3 else 1.0)
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)
    assert oracle.fired == [3]


def check_a_bad_row_stays_a_bad_row(make: Make, name: str, bad: float) -> None:
    """A row that is not finite keeps weights and memory; all other tensors are the same bit for bit."""
    models = [zoo(torch.float32) for _ in range(2)]
    optimizers = [make(model) for model in models]
    for step in range(4):
        for model, optimizer, broken in zip(models, optimizers, (False, True), strict=True):
            give(model, step)
            if broken and step == 2:
                p = dict(model.named_parameters())[name]
                p.grad.view(-1)[-1] = bad
                before = (
                    weights_of(model)[name][-1].clone(),
                    {key: value[-1] for key, value in memory_of(optimizer, model, name).items()},
                )
            optimizer.step()
            if broken and step == 2:
                assert torch.equal(weights_of(model)[name][-1], before[0]), f"the bad row of {name} moved"
                for key, value in memory_of(optimizer, model, name).items():
                    assert torch.equal(value[-1], before[1][key]), f"{key} of the bad row of {name} learned"
    clean, broken_weights = (weights_of(model) for model in models)
    same(clean, broken_weights, but=name)
    assert all(w.isfinite().all() for w in broken_weights.values()), "a bad value reached the weights"
    if SHEETS[name].direction == "adam":  # Adam's directions do not mix rows
        assert torch.equal(clean[name][:-1], broken_weights[name][:-1]), f"another row of {name} moved differently"


def check_one_huge_row_moves_no_other_tensor(make: Make) -> None:
    """One row x 1e6 is bounded before it enters a memory; the collective rule does not see it."""
    models = [zoo(torch.float32) for _ in range(2)]
    for model, size in zip(models, (1.0, 1e6), strict=True):
        optimizer = make(model)
        for step in range(4):
            give(model, step)
            if step == 2:
                model.linear.weight.grad[1] *= size
            optimizer.step()
    clean, spiked = (weights_of(model) for model in models)
    same(clean, spiked, but="linear.weight")
    momentum = memory_of(optimizer, models[1], "linear.weight")["momentum"]
    assert (momentum.norm(dim=1) < 0.21 * spiked["linear.weight"].norm(dim=1)).all(), "a huge row fills the momentum"


def check_a_scaled_batch_is_scaled_back(make: Make) -> None:
    """The same gradients, one batch of them x 1,000: what enters the memories is the batch as it was, within a few %.

    The rule divides by the median of rows' norms over their recent norms. Here these are the same at every step, so
    that the run is the clean one to rounding.
    """
    models = [zoo() for _ in range(2)]
    for model, size in zip(models, (1.0, 1000.0), strict=True):
        optimizer = make(model)
        for step in range(6):
            give(model, 0, size if step == 3 else 1.0)
            model.words.weight.grad[0::3] = 0
            optimizer.step()
    clean, scaled = (weights_of(model) for model in models)
    for name in clean:
        torch.testing.assert_close(scaled[name], clean[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def check_few_rows_are_no_batch(make: Make, without: Make) -> None:
    """With fewer than 16 rows a jump of all of them is bounded row by row: no median tells it from single rows."""
    for rows, fires in ((1, False), (2, False), (15, False), (16, True)):
        runs = []
        for build in (make, without):
            torch.manual_seed(0)
            model = nn.Linear(3, rows, bias=False, dtype=torch.float64)
            optimizer = build(model)
            for step in range(4):
                model.weight.grad = gradient_of(model.weight, step, 1e-3 if step == 2 else 1e-6)
                optimizer.step()
            runs.append(model.weight.detach().clone())
        assert torch.equal(*runs) != fires, f"{rows} rows"


def check_the_rule_costs_a_clean_run_nothing(make: Make, without: Make) -> None:
    """A clean run is the same bit for bit with and without the collective rule."""
    models = [zoo(torch.float32) for _ in range(2)]
    for model, build in zip(models, (make, without), strict=True):
        optimizer = build(model)
        for step in range(10):
            give(model, step)
            optimizer.step()
    same(*(weights_of(model) for model in models))


def check_the_scale_of_the_loss_does_not_matter(make: Make) -> None:
    """Where no row is bounded, the loss may be multiplied by any power of two; directions have no units."""
    runs = []
    for scale in (1.0, 2.0**-20):
        model = zoo()
        optimizer = make(model, budget=gs.Fixed(float("inf")), eps=0.0)
        for step in range(5):
            give(model, step, scale)
            optimizer.step()
        runs.append(weights_of(model))
    for name, clean in runs[0].items():
        torch.testing.assert_close(runs[1][name], clean, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def check_rows_do_not_outgrow_their_limit(make: Make, dtype: torch.dtype = torch.float64) -> None:
    """Whatever is asked for, no row of a matrix grows beyond the larger of its first length and 3."""
    model = zoo(dtype)
    with torch.no_grad():
        model.linear.weight[0] *= 10
    longest = {name: w.norm(dim=1).clamp(min=3.0) for name, w in weights_of(model).items()}
    optimizer = make(model, lr=0.3)
    for _ in range(30):
        for name, p in model.named_parameters():
            p.grad = -p.detach().clone() if name != "zero.weight" else -torch.ones_like(p)
        optimizer.step()
    reached, slack = set(), 1 + 4 * torch.finfo(dtype).eps
    for name, w in weights_of(model).items():
        if SHEETS[name].what == "matrix":
            assert (w.norm(dim=1) <= longest[name] * slack).all(), f"{name} has outgrown its limit"
            if w.numel() and bool((w.norm(dim=1) > 0.95 * longest[name]).any()):
                reached.add(name)
    assert "linear.weight" in reached and len(reached) > 5, "the limits were never tried"


def check_rows_move_by_their_share(make: Make, dtype: torch.dtype = torch.float64) -> None:
    """Without decay every row of a matrix moves by exactly tau of its length, and Adam's rows by at most that."""
    model, tau = zoo(dtype), 0.05
    optimizer = make(model, lr=tau, weight_decay=0.0)
    eps = torch.finfo(dtype).eps
    for step, size in enumerate([1e6, 1.0, 1e-6, 1e3]):
        before = weights_of(model)
        give(model, step, size)
        optimizer.step()
        for name, new in weights_of(model).items():
            sheet, old = SHEETS[name], before[name]
            root = old.shape[1] ** 0.5
            least = root if sheet.what == "vector" else 0.1 * root
            share = tau * SHARE[sheet.what] * old.norm(dim=1).clamp(min=least)
            moved, slack = (new - old).norm(dim=1), share * 1e-6 + 4 * eps * old.norm(dim=1).clamp(min=least)
            assert (moved <= share + slack).all(), f"step {step}: {name} moved by more than its share"
            if sheet.direction == "orthogonal":
                limited = new.norm(dim=1) >= 3.0 * (1 - 1e-3)  # shortened afterwards
                assert ((moved >= share - slack) | limited).all(), f"step {step}: {name} moved by less than its share"


def wide_zoo() -> tuple[nn.Module, dict[str, float]]:
    """Matrices at zero, and the length that each of their rows counts as, by hand: 0.1 sqrt(n min(1, 64 / side))."""
    model = nn.Module()
    model.square = nn.Linear(256, 256, bias=False)  # side 256
    model.up, model.down = nn.Linear(96, 384, bias=False), nn.Linear(384, 96, bias=False)  # side 96, both
    model.narrow, model.flat = nn.Linear(64, 256, bias=False), nn.Linear(256, 16, bias=False)  # sides 64 and 16
    model.attention = nn.MultiheadAttention(128, 2, bias=False)  # three matrices of 128 x 128, and one
    model.grouped = nn.Conv2d(64, 128, 2, groups=2, bias=False)  # two matrices of 64 x 128
    model.words = nn.Embedding(100, 100)
    lengths = {
        "square": 0.8,
        "up": 0.8,
        "down": 1.6,
        "narrow": 0.8,
        "flat": 1.6,
        "grouped": 0.1 * 128**0.5,
        "attention": 0.8,
    }
    for p in model.parameters():
        nn.init.zeros_(p)
    return model, lengths


def check_short_rows_count_as_less_in_wide_matrices(make: Make) -> None:
    """A row at zero moves by tau times the length that it counts as."""
    model, lengths = wide_zoo()
    optimizer = make(model, lr=0.05)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()
    for name, p in model.named_parameters():
        moved = p.detach().flatten(1).norm(dim=1)
        if name.startswith("words"):
            assert float(moved.max()) <= 0.05 * 1.0 * (1 + 1e-5), "embeddings count as 0.1 sqrt n at every width"
            assert float(moved.max()) > 0.05 * 0.81, "embeddings count as 0.1 sqrt n at every width"
            continue
        expected = torch.full_like(moved, 0.05 * lengths[name.split(".")[0]])
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0.0, msg=name)


def check_without_gradient_a_row_stays(make: Make) -> None:
    """Rows whose gradients have been zero since the start do not move, and do not decay."""
    model = zoo()
    optimizer = make(model, weight_decay=0.5)
    before = weights_of(model)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    same(weights_of(model), before)
    for step in range(3):
        give(model, step)
        for p in (model.linear.weight, model.words.weight, model.conv2.weight):
            p.grad[2] = 0
        optimizer.step()
    after = weights_of(model)
    for name in ("linear.weight", "words.weight", "conv2.weight"):
        assert torch.equal(after[name][2], before[name][2]), f"{name}: a row without gradient moved"
        assert not torch.equal(after[name], before[name])


def check_a_row_that_loses_its_gradient_rests(make: Make) -> None:
    """A row of a matrix stays while its gradient is zero, and its momentum fades; a token goes on, and fades too."""
    model, rows = zoo(), {"linear.weight": [2], "conv2.weight": [2], "experts.weight": [2, 3], "words.weight": [2]}
    optimizer = make(model, weight_decay=0.5)
    give(model, 0)
    optimizer.step()
    strides = []
    for step in range(1, 5):
        before, memory = weights_of(model), {name: memory_of(optimizer, model, name) for name in rows}
        give(model, step)
        for name, at in rows.items():
            gradient = dict(model.named_parameters())[name].grad
            gradient.view(SHEETS[name].rows, -1)[at] = 0
        optimizer.step()
        for name, at in rows.items():
            moved = (weights_of(model)[name] - before[name]).norm(dim=1)
            assert bool((moved[0:2] > 0).all()), f"{name}: a row with a gradient stayed"
            if name != "words.weight":
                assert bool((moved[at] == 0).all()), f"{name}: a row without gradient moved"
                fresh = memory_of(optimizer, model, name)["momentum"][at]
                torch.testing.assert_close(fresh, 0.9 * memory[name]["momentum"][at])
        strides.append(float((weights_of(model)["words.weight"][2] - before["words.weight"][2]).norm()))
    assert strides == sorted(strides, reverse=True) and strides[-1] > 0, "the steps of a token do not fade"


def check_saving_changes_nothing(make: Make) -> None:
    """Saved after three steps and loaded into a fresh optimizer, every later step is the same bit for bit."""
    runs = []
    for save in (True, False):
        model = zoo(torch.bfloat16)
        optimizer = make(model)
        for step in range(7):
            if save and step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(model, lr=0.5)
                optimizer.load_state_dict(state)
            give(model, step, 300.0 if step == 4 else 1.0)
            optimizer.step()
        runs.append(weights_of(model))
    same(*runs)


def check_gradients_are_only_read(make: Make) -> None:
    """A step writes to no gradient, whatever it bounds."""
    for maximize in (False, True):
        model = zoo()
        optimizer = make(model, maximize=maximize)
        give(model, 0, 1e6)
        given = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), given, strict=True))


def check_blocks_do_not_see_each_other(make: Make) -> None:
    """Queries, keys and values, groups of a convolution and experts: a change in one moves no other."""
    for name, first in {"attention.in_proj_weight": 4, "grouped.weight": 3, "experts.weight": 2}.items():
        runs = []
        for other in (1.0, -3.0):
            model = zoo()
            optimizer = make(model)
            for step in range(3):
                give(model, step)
                rows = dict(model.named_parameters())[name].grad.view(SHEETS[name].rows, -1)
                rows[first:] *= other
                optimizer.step()
            runs.append(weights_of(model)[name])
        assert torch.equal(runs[0][:first], runs[1][:first]), f"{name}: a block has seen another"
        assert not torch.equal(runs[0][first:], runs[1][first:])


def check_the_built_in_schedule(make: Make) -> None:
    """With ``steps=`` the share falls linearly to zero; beyond the end nothing moves, and one warning says so."""
    model = zoo()
    optimizer, moved = make(model, steps=4, weight_decay=0.0), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(6):
            before = model.one_row.weight.detach().clone()
            give(model, step)
            optimizer.step()
            moved.append(float((model.one_row.weight.detach() - before).norm() / before.norm()))
    torch.testing.assert_close(moved, [0.03, 0.0225, 0.015, 0.0075, 0.0, 0.0])
    assert len([w for w in told if "step 4 is beyond the end" in str(w.message)]) == len(told) == 1
