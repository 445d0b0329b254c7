"""The share step beside a float64 oracle, for every kind of tensor, dtype and memory layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.optim.directions import orthogonalised
from tests.optim.share.oracle import Sheet, newton_schulz
from tests.optim.share.zoo import SHEETS, assert_follows, follow, give, gradient_of, oracle_of, zoo


@pytest.mark.parametrize("fused", [False, None], ids=["definition", "default"])
def test_every_kind_of_tensor_follows_the_formulas_over_twelve_steps(fused):
    model = zoo()
    optimizer, oracle = gs.GSO(model, fused=fused), oracle_of(model, SHEETS)
    for step in range(12):
        give(model, step, size=300.0 if step == 7 else 1.0)
        if step in (2, 5):
            model.linear.weight.grad = None
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)
    assert oracle.fired == [7]


def test_groups_of_their_own_constants_ascending_under_a_schedule():
    model = zoo()
    pairs = list(model.named_parameters())
    constants = [
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.5, "maximize": True},
        {"lr": torch.tensor(0.01, dtype=torch.float64), "betas": (0.95, 0.999), "weight_decay": 0.0},
    ]
    optimizer = gs.GSO([{"params": pairs[k::2], **options} for k, options in enumerate(constants)])
    sheets = dict(SHEETS)
    # Without a module, shapes alone decide.
    sheets["words.weight"], sheets["bag.weight"] = Sheet("matrix", 7, 4), Sheet("matrix", 3, 2)
    for name in ("grouped.weight", "depthwise.weight", "attention.in_proj_weight"):
        sheets[name] = Sheet("matrix", sheets[name].rows, sheets[name].cols)
    sheets["experts.weight"] = Sheet("matrix", 4, 6)
    holder = oracle_of(model, sheets)
    for step in range(8):
        give(model, step)
        for group, base in zip(optimizer.param_groups, (0.1, 0.01), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(base * (1 - step / 8))
            else:
                group["lr"] = base * (1 - step / 8)
        optimizer.step()
        _follow_in_groups(holder, model, optimizer)
        assert_follows(model, holder, step)


def _follow_in_groups(oracle, model, optimizer):
    """The collective rule sees all groups at once; the update then goes group by group."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    options = []
    for p in model.parameters():
        group = group_of[id(p)]
        sign = -1.0 if group["maximize"] else 1.0
        options.append((sign, float(group["lr"]), group["weight_decay"], group["betas"], group["eps"]))
    update = oracle._update

    def in_its_group(t, gradient, factor, *_):
        sign, *constants = options[t]
        update(t, sign * gradient, factor, *constants)

    oracle._update = in_its_group
    try:
        follow(oracle, model)
    finally:
        del oracle._update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_follow_within_their_rounding_and_remember_in_float32(dtype):
    model = zoo(dtype)
    optimizer, oracle = gs.GSO(model), oracle_of(model, SHEETS)
    eps = torch.finfo(dtype).eps
    for step in range(4):
        give(model, step)
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step, rtol=20 * eps, atol=20 * eps)
    for state in optimizer.state.values():
        assert all(value.dtype in (torch.float32, torch.complex64) for value in state.values())


@pytest.mark.filterwarnings("ignore:.*falls back to eager torch")
@pytest.mark.parametrize("form", ["channels_last", "transposed", "gaps"])
def test_memory_formats_change_nothing(form):
    model = zoo()
    with torch.no_grad():
        for p in model.parameters():
            if form == "channels_last" and p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
            elif p.is_complex():
                continue
            elif form == "transposed" and p.dim() == 2:
                p.data = p.data.t().contiguous().t()
            elif form == "gaps" and 0 < p.dim() < 3:
                p.data = torch.stack([p.data, p.data], -1)[..., 0]
    assert any(not p.is_contiguous() for p in model.parameters())
    optimizer, oracle = gs.GSO(model), oracle_of(model, SHEETS)
    for step in range(4):
        give(model, step)
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)


def test_experts_that_cannot_be_seen_as_rows_are_refused_with_the_remedy():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 2).transpose(1, 2))

    with pytest.raises(ValueError, match=r"'weight'.* contiguous"):
        gs.GSO(Experts())


def test_blocks_as_a_mapping_are_made_orthogonal_one_by_one():
    model = zoo()
    sheets = SHEETS | {
        "linear.weight": Sheet("matrix", 4, 5, blocks=2),
        "lstm.weight_ih_l0": Sheet("matrix", 8, 3, blocks=4),
        "lstm.weight_hh_l0": Sheet("matrix", 8, 2, blocks=4),
    }
    optimizer = gs.GSO(model, blocks={"linear.weight": 2, "lstm.weight_*": 4})
    oracle = oracle_of(model, sheets)
    for step in range(4):
        give(model, step)
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)


@pytest.mark.parametrize("fused", [False, None], ids=["definition", "default"])
def test_an_embedding_that_is_named_turns_as_a_matrix_and_keeps_its_share_and_limits(fused):
    model = zoo()
    optimizer = gs.GSO(model, direction={"words.weight": "orthogonal"}, fused=fused)
    oracle = oracle_of(model, SHEETS | {"words.weight": Sheet("embedding", 7, 4, direction="orthogonal")})
    for step in range(4):
        give(model, step)
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)


@pytest.mark.parametrize("strategy", ["rows", "columns", "lbf"])
def test_blocks_as_a_plan_are_its_bins(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(3, 4, 2)).double()
    layout = gs.layout_of(model)
    energy = {name: torch.rand(p.shape).numpy() ** 4 for name, p in model.named_parameters()}
    plan = {
        "rows": lambda: gs.xsp(layout, parts=2),
        "columns": lambda: gs.xsp(layout, parts=3, axis=1),
        "lbf": lambda: gs.lbf(layout, energy, max_bins=16, min_gain=0.0),
    }[strategy]()
    sheets = {}
    for name, p in model.named_parameters():
        boxes = [box for b in plan.bins for box in b.boxes if box.tensor == name]
        rows, cols = (1, p.numel()) if p.dim() < 2 else (p.shape[0], p[0].numel())
        what = "vector" if p.dim() < 2 else "matrix"
        corners = tuple((box.start[0], box.stop[0], box.start[1], box.stop[1]) for box in boxes)
        sheets[name] = Sheet(what, rows, cols, boxes=corners if what == "matrix" else ())
    assert any(len(sheet.boxes) > 1 for sheet in sheets.values())
    optimizer, oracle = gs.GSO(model, blocks=plan), oracle_of(model, sheets)
    for step in range(4):
        give(model, step)
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)


@pytest.mark.parametrize("shape", [(5, 5), (3, 9), (9, 3), (1, 7), (7, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_singular_values_are_drawn_near_one_and_singular_vectors_stay(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    small = min(shape)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=dtype, generator=generator), full_matrices=False)
    values = torch.logspace(0, -1.9, small, dtype=torch.float64)
    x = (u * values.to(dtype)) @ vh * 1e-5
    made = orthogonalised(x[None])[0]
    mixed = u.mH @ made @ vh.mH  # diagonal, if the singular vectors are those of x
    drawn = torch.diagonal(mixed)
    assert (mixed - torch.diag(drawn)).abs().max() < 1e-12
    assert ((drawn.abs() > 0.65) & (drawn.abs() < 1.25)).all()
    np.testing.assert_allclose(made.resolve_conj().numpy(), newton_schulz(x.numpy()), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (8, 15), (8, 8)])
def test_in_single_precision_long_matrices_lose_no_more_than_a_thousandth(shape):
    """Long matrices gather the polynomials of their Gram matrices, which square what is small."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64, generator=generator), full_matrices=False)
    x = (u * torch.logspace(0, -6, min(shape), dtype=torch.float64)) @ vh
    true = newton_schulz(x.numpy())
    made = orthogonalised(x.float()[None])[0]
    assert np.linalg.norm(made.numpy() - true) < 1e-3 * np.linalg.norm(true)


def test_a_matrix_of_zeros_has_no_direction():
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_embeddings_without_their_module_may_be_named():
    model = zoo()
    optimizer = gs.GSO(model.named_parameters(), direction={"words.*": "adam", "bag.*": "adam"})
    assert {"exp_avg", "exp_avg_sq"} <= set(_memory(optimizer, model, model.words.weight))
    assert "momentum" in _memory(gs.GSO(model.named_parameters()), model, model.words.weight)


def _memory(optimizer, model, p):
    p.grad = gradient_of(p, 0)
    optimizer.step()
    return optimizer.state[p]


@pytest.mark.parametrize("fused", [False, None], ids=["definition", "default"])
def test_rows_that_are_written_longer_from_outside_stay_and_grow_no_further(fused):
    """Weights that are loaded after the first step are not drawn back to a limit that was another model's."""
    model = zoo(torch.float64)
    optimizer, oracle = gs.GSO(model, fused=fused), oracle_of(model, SHEETS)
    for step in range(6):
        give(model, step)
        if step == 2:
            with torch.no_grad():
                for p, held in zip(model.parameters(), oracle.weights, strict=True):
                    p.mul_(40.0)
                    held *= 40.0
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        follow(oracle, model)
        assert_follows(model, oracle, step)
        if step == 2:
            kept = [
                p.detach().norm() / w.norm() for p, w in zip(model.parameters(), before, strict=True) if w.norm() > 0
            ]
            assert min(kept) > 0.9
