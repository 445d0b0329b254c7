"""GSO against its formulas: 100 steps beside a float64 oracle, and beside torch's AdamW where no limit binds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradsplit as gs
from tests.laws import laws_of_updates as laws
from tests.laws.cases import parameters, plan_of, served_backends, tensors
from tests.laws.laws_of_updates import LAYOUT
from tests.laws.oracles import label_elements, to_numpy
from tests.optim.oracle import Group, Oracle

pytestmark = pytest.mark.filterwarnings("ignore:.*falls back to eager torch")

BACKENDS = served_backends()
UNBOUNDED = gs.Fixed(float("inf"))


@pytest.mark.parametrize("second_moment", ["element", "bin"])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_steps_of_two_groups_ascending_under_a_schedule_with_a_tensor_rate(backend, bounded, second_moment):
    """Everything at once: groups of their own rates, betas and decay; maximize; a 0-d tensor as rate; a cosine."""
    pairs = parameters(LAYOUT)
    plan = plan_of("xsp", LAYOUT)
    labels = label_elements(plan)
    kinds = [Group(lr=0.05, weight_decay=0.1), Group(lr=0.01, betas=(0.8, 0.95), eps=1e-6, maximize=True)]
    owners = [kinds[t % 2] for t in range(len(pairs))]
    groups = []
    for k, kind in enumerate(kinds):
        members = [pair for t, pair in enumerate(pairs) if t % 2 == k]
        lr = torch.tensor(kind.lr, dtype=torch.float64) if k else kind.lr
        groups.append(
            {
                "params": members,
                "lr": lr,
                "betas": kind.betas,
                "eps": kind.eps,
                "weight_decay": kind.weight_decay,
                "maximize": kind.maximize,
            }
        )
    oracle = Oracle(
        [to_numpy(p, tuple(p.shape)) for _, p in pairs],
        labels,
        owners,
        factor=0.2 if bounded else None,
        tau=0.03 if bounded else None,
        per_bin=second_moment == "bin",
    )
    options = {} if bounded else {"budget": UNBOUNDED}
    optimizer = gs.GSO(groups, plan=gs.xsp, second_moment=second_moment, backend=backend, **options, direction="adam")
    for step in range(100):
        pace = 0.5 * (1 + math.cos(math.pi * step / 100))
        for group, kind, base in zip(optimizer.param_groups, kinds, (0.05, 0.01), strict=True):
            kind.lr = base * pace
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(kind.lr)
            else:
                group["lr"] = kind.lr
        gradients: list[torch.Tensor | None] = list(
            tensors(LAYOUT, torch.float64, "contiguous", 7 * step, size=100.0 if step % 17 == 0 else 0.1)
        )
        gradients[step % len(pairs)] = None
        for (_, p), gradient in zip(pairs, gradients, strict=True):
            p.grad = gradient
        kept = [None if g is None else g.clone() for g in gradients]
        optimizer.step()
        oracle.step([None if g is None else to_numpy(g, tuple(g.shape)) for g in kept])
        for old, (_, p) in zip(kept, pairs, strict=True):
            assert old is None or torch.equal(old, p.grad), "the optimizer wrote to a gradient"
    rtol = 1e-5 if second_moment == "bin" else 1e-8  # one second moment a bin is kept in float32
    for (name, p), want in zip(pairs, oracle.weights, strict=True):
        np.testing.assert_allclose(to_numpy(p, want.shape), want, rtol=rtol, atol=rtol * 1e-3, err_msg=name)


@pytest.mark.parametrize("strategy", ["xsp", "per_tensor", "lbf"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second_moment", ["element", "bin"])
def test_every_partition_follows_the_formulas(strategy, backend, second_moment):
    options = {"backend": backend, "second_moment": second_moment}
    laws.check_equals_the_formulas(gs.GSO, plan_of(strategy, LAYOUT), options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strides", ["transposed", "channels_last", "gaps"])
def test_every_memory_layout_follows_the_formulas(strides, backend):
    options = {"backend": backend, "strides": strides, "maximize": True, "weight_decay": 0.5}
    laws.check_equals_the_formulas(gs.GSO, plan_of("xsp", LAYOUT), options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_move_by_a_share_of_their_length(backend, dtype):
    def make(pairs, **options):
        return gs.GSO(pairs, backend=backend, **options)

    laws.check_rows_move_by_a_share_of_their_length(make, plan_of("xsp", LAYOUT), dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("second_moment", ["element", "bin"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_bin_is_passed_over(backend, second_moment, bad):
    options = {"backend": backend, "second_moment": second_moment}
    laws.check_a_bad_bin_is_passed_over(gs.GSO, plan_of("xsp", LAYOUT), bad, options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second_moment", ["element", "bin"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saving_changes_nothing(backend, second_moment, dtype):
    options = {"backend": backend, "second_moment": second_moment, "budget": (gs.Ema(1.1, warmup=2), gs.RelativeStep())}
    laws.check_saving_changes_nothing(gs.GSO, plan_of("xsp", LAYOUT), dtype, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_binding_limit_it_is_adamw_over_a_hundred_steps(backend, maximize):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(1), nn.Linear(12, 4)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    constants = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.05, "maximize": maximize}
    optimizers = [
        gs.GSO(models[0], budget=UNBOUNDED, backend=backend, **constants, direction="adam"),
        torch.optim.AdamW(models[1].parameters(), **constants),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 100) for o in optimizers]
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=generator)
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean() - model(x).mean()
            (-loss if maximize else loss).backward()
            optimizer.step()
            scheduler.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_complex_parameters_are_bounded_by_their_modulus_and_move_as_pairs_of_reals():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
    optimizer = gs.GSO([("w", w)], lr=0.1, direction="adam")
    oracle = Oracle(
        [torch.view_as_real(w.detach()).numpy().copy()],
        [np.repeat(np.arange(3), 8).reshape(3, 4, 2)],
        [Group(lr=0.1)],
    )
    for step in range(10):
        w.grad = torch.randn(3, 4, dtype=torch.complex128) * 10.0 ** (step % 3)
        oracle.step([torch.view_as_real(w.grad).numpy().copy()])
        optimizer.step()
    np.testing.assert_allclose(torch.view_as_real(w.detach()).numpy(), oracle.weights[0], rtol=1e-9)
