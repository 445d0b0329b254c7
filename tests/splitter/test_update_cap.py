"""cap_updates: behind any optimizer no row moves by more than a share of its length, and nothing else changes."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsplit as gs
from gradsplit import update_cap

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.3),
    "SGD": lambda p: torch.optim.SGD(p, lr=30.0, momentum=0.9),
}


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Conv1d(2, 3, 2)).to(dtype)


def rows(p):
    return p.detach().reshape(p.shape[0], -1) if p.dim() > 1 else p.detach().reshape(1, -1)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_move_by_a_share_of_their_length(make, dtype):
    model = model_of(dtype)
    optimizer = make(model.parameters())
    gs.GradientSplitter(model, cap_updates=True).attach(optimizer)
    moved_at_all = False
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 10.0**step
        before = [rows(p).clone().double() for p in model.parameters()]
        optimizer.step()
        for old, p in zip(before, model.parameters(), strict=True):
            length, moved = old.norm(dim=1), (rows(p).double() - old).norm(dim=1)
            bound = 0.03 * torch.maximum(length, torch.full_like(length, 0.01 * old.shape[1] ** 0.5))
            assert (moved <= bound * (1 + 1e-6) + 2 * torch.finfo(dtype).eps * length).all()
            moved_at_all |= bool((moved > 0.5 * bound).any())
    assert moved_at_all


def test_within_the_cap_every_bit_is_the_optimizers():
    finals = []
    for capped in (True, False):
        model = model_of(torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        if capped:
            gs.GradientSplitter(model, cap_updates=True).attach(optimizer)
        for step in range(5):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_an_update_that_is_not_finite_is_undone_and_the_other_rows_move():
    model = model_of(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gs.GradientSplitter(model, budget=(gs.RelativeStep(), gs.Fixed(float("inf"))), cap_updates=True).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def spoil(*_):  # after the splitter has read the gradients
        model[0].weight.grad[1] = float("inf")

    optimizer.register_step_pre_hook(spoil)
    before = model[0].weight.detach().clone()
    optimizer.step()
    after = model[0].weight.detach()
    assert torch.equal(after[1], before[1])
    assert (after[[0, 2, 3, 4, 5]] != before[[0, 2, 3, 4, 5]]).all()


def test_with_a_closure_the_whole_step_is_bounded_and_not_its_last_trial():
    """LBFGS moves the weights inside its closure; what counts is where the step began."""
    model = model_of()
    x = torch.randn(8, 5, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = (model[0](x) - 100).square().mean()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(model[0].parameters(), lr=1.0, max_iter=8)
    gs.GradientSplitter(model[0], cap_updates=True).attach(optimizer)
    before = rows(model[0].weight).clone()
    optimizer.step(closure)
    moved = (rows(model[0].weight) - before).norm(dim=1)
    assert (moved <= 0.03 * before.norm(dim=1) * (1 + 1e-9)).all()
    assert (moved > 0).any()


def test_given_an_optimizer_it_attaches_itself_and_counts_every_step_once():
    for by_hand in (True, False):
        model = model_of()
        optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
        splitter = gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            before = rows(model[0].weight).clone()
            if by_hand:
                splitter.step()
            optimizer.step()
            moved = (rows(model[0].weight) - before).norm(dim=1)
            assert (moved <= 0.03 * before.norm(dim=1) * (1 + 1e-9)).all()
        assert splitter.step_count == 3


@pytest.mark.parametrize("rate", [1e-5, 10.0])
def test_with_a_share_every_row_moves_by_its_limit_in_the_optimizers_direction(rate):
    finals = {}
    for step in ("share", None):
        model = model_of()
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        if step is not None:
            gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True, step=step)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
        model[0].weight.grad[2] = 0.0
        before = [rows(p).clone() for p in model.parameters()]
        optimizer.step()
        finals[step] = [rows(p) - old for p, old in zip(model.parameters(), before, strict=True)]
    for shared, plain, old in zip(finals["share"], finals[None], before, strict=True):
        length = torch.maximum(old.norm(dim=1), torch.full_like(old[:, 0], 0.01 * old.shape[1] ** 0.5))
        moves = plain.norm(dim=1) > 0
        expected = torch.where(moves, 0.03 * length, 0.0)
        torch.testing.assert_close(shared.norm(dim=1), expected, rtol=1e-9, atol=1e-15)
        directions = (shared * plain).sum(1)[moves]
        torch.testing.assert_close(directions, (expected * plain.norm(dim=1))[moves], rtol=1e-9, atol=1e-15)


def test_rows_without_a_gradient_are_not_driven_by_decay_alone():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True, step="share")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[0].weight.grad[2] = 0.0
    before = rows(model[0].weight).clone()
    optimizer.step()
    torch.testing.assert_close(rows(model[0].weight)[2], before[2] * (1 - 1e-4))


@pytest.mark.parametrize("plan", ["xsp", "per_tensor", "columns", "whole", "cells"])
@pytest.mark.parametrize("step", ["cap", "share"])
def test_block_by_block_is_the_same(plan, step, monkeypatch):
    finals = []
    for block in (1 << 20, 7):
        monkeypatch.setattr(update_cap, "BLOCK", block)
        model = model_of()
        layout = gs.layout_of(model)
        energy = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
        made = {"columns": gs.xsp(layout, axis=1), "cells": gs.lbf(layout, energy, max_bins=20)}
        optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
        chosen = made.get(plan, plan)
        gs.GradientSplitter(model, chosen, optimizer=optimizer, cap_updates=True, step=step)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
        optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
    for whole, blocks in zip(*finals, strict=True):
        torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-15)


def test_a_cap_holds_one_copy_of_the_weights_and_little_beside(monkeypatch):
    """Counts the bytes that are allocated while the cap acts, by the allocator's own record."""
    monkeypatch.setattr(update_cap, "BLOCK", 1 << 13)
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 256, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    splitter = gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cap = splitter._cap
    with torch.profiler.profile(profile_memory=True) as seen:
        cap.remember(anew=True)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        cap.apply()
    now = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert weights <= peak <= 1.1 * weights + 8 * 8 * splitter.plan.num_bins


class Visits(TorchDispatchMode):
    """Notes, operation by operation, which block of which tensor is read or written."""

    def __init__(self, tensors, block):
        super().__init__()
        self.found, self.operations = [], 0
        self._spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        self._bytes = block * tensors[0].element_size()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.is_view or function.namespace != "aten":
            return out
        flat = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        touched = set()
        for i, (start, stop) in enumerate(self._spans):
            for x in flat:
                if start <= x.data_ptr() < stop:
                    touched.add((i, (x.data_ptr() - start) // self._bytes))
                    assert x.numel() * x.element_size() <= self._bytes, "more than one block at a time"
        if touched:
            self.operations += 1
            self.found += [one for one in touched if self.found[-1:] != [one]]
        return out


@pytest.mark.parametrize(("plan", "most"), [("xsp", 1), ("per_tensor", 2)])
def test_a_cap_that_bites_comes_to_every_block_once_where_rows_are_bins(plan, most, monkeypatch):
    """Beside the copy before the step it is one pass over the weights; two where a bin is larger than a block."""
    block = 1 << 12
    monkeypatch.setattr(update_cap, "BLOCK", block)
    model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.Linear(256, 96, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    cap = gs.GradientSplitter(model, plan, optimizer=optimizer, cap_updates=True)._cap
    cap.remember(anew=True)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    with Visits(list(model.parameters()), block) as seen:
        cap.apply()
    blocks = sum(p.numel() for p in model.parameters()) // block
    counts = collections.Counter(seen.found)
    assert len(counts) == blocks
    assert max(counts.values()) == most
    assert seen.operations == 2 * blocks, "one difference and one interpolation per block"
    assert all(
        (rows(p) - rows(old)).norm() < 0.031 * old.norm() for p, old in zip(model.parameters(), before, strict=True)
    )


def test_rows_within_the_cap_keep_their_bits_beside_rows_that_are_drawn_back():
    model = model_of(torch.float32)
    finals = []
    for capped in (True, False):
        model = model_of(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if capped:
            gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True)
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-4)
        model[0].weight.grad[[1, 4]] = 1e3
        optimizer.step()
        finals.append(model[0].weight.detach().clone())
    capped, free = finals
    assert torch.equal(capped[[0, 2, 3, 5]], free[[0, 2, 3, 5]])
    assert (capped[[1, 4]] - free[[1, 4]]).abs().min() > 1


@pytest.mark.parametrize("level", ["root", "tensor"])
def test_a_limit_above_the_bins_is_decided_on_all_at_once(level, monkeypatch):
    monkeypatch.setattr(update_cap, "BLOCK", 7)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    gs.GradientSplitter(model, budget={level: gs.RelativeStep(0.03)}, optimizer=optimizer, cap_updates=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = [(p.detach() - old).norm() for p, old in zip(model.parameters(), before, strict=True)]
    length = [old.norm() for old in before]
    pairs = (
        [(torch.stack(moved).norm(), torch.stack(length).norm())]
        if level == "root"
        else zip(moved, length, strict=True)
    )
    for far, long in pairs:
        torch.testing.assert_close(far, 0.03 * long, rtol=1e-9, atol=0)


class Dtypes(TorchDispatchMode):
    """Notes in which dtype lengths of matrices are measured."""

    def __init__(self):
        super().__init__()
        self.wide = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if "vector_norm" in str(func) and args[0].dim() > 1:
            self.wide += made.dtype == torch.float64
        return made


def lengths_seen(size):
    """Move a matrix of float32 by ``size`` times its own values; return how often it was measured in float64."""
    model = nn.Linear(64, 64, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gs.GradientSplitter(model, optimizer=optimizer, cap_updates=True)
    model.weight.grad = torch.full_like(model.weight, size)
    with Dtypes() as seen:
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((64, 64), 1.0 - min(size, 0.03)))
    return seen.wide


def test_matrices_are_measured_in_their_own_dtype_where_squares_keep_their_digits():
    assert lengths_seen(1e-3) == 0
    assert lengths_seen(0.0) == 0
    assert lengths_seen(1e25) > 0  # whose squares float32 does not hold


@pytest.mark.parametrize("kind", ["rows", "cols"])
def test_lengths_in_float32_are_those_of_float64(kind):
    x = torch.randn(300, 500, generator=torch.Generator().manual_seed(3))
    x[:, 7] *= 1e-6
    x[11] *= 1e-6
    x[12] = 0.0
    wanted = x.double().square().sum(1 if kind == "rows" else 0).sqrt()
    torch.testing.assert_close(update_cap._lengths(x, kind, torch.float64), wanted, rtol=1e-6, atol=0.0)
    for times in (1e-25, 1e25):
        found = update_cap._lengths(x * times, kind, torch.float64)
        torch.testing.assert_close(found, (x * times).double().square().sum(1 if kind == "rows" else 0).sqrt())
