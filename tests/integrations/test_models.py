"""Well-known architectures: a plan under every strategy, a bounded step, a step of GSO, and going on from a file."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import gradsplit as gs
from gradsplit.plan import STRATEGIES
from tests.architecture.sources import ROOT
from tests.integrations.tiny_models import ARCHITECTURES
from tests.laws.oracles import label_elements, square_sums

PAGE = ROOT / "docs/results/models.md"
EVERY = pytest.mark.parametrize("name", ARCHITECTURES)
EACH = pytest.mark.parametrize("strategy", STRATEGIES)
TAU = 0.03


def plan_of(name, strategy):
    """The strategy's plan, from the energies of two backward passes where it needs them."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    splitter = gs.GradientSplitter(model, strategy, gs.Fixed(1.0))
    if STRATEGIES[strategy].needs_energy:
        splitter.calibrate(lambda: architecture.backward(model), steps=2)
    return splitter.plan


def kept_in_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@EVERY
@EACH
def test_each_bin_is_within_its_limit_after_a_step_and_the_others_are_untouched(name, strategy):
    architecture, plan = ARCHITECTURES[name], plan_of(name, strategy)
    model = architecture.build()
    architecture.backward(model)
    before = [None if p.grad is None else p.grad.clone() for p in trainable(model)]
    norms = np.sqrt(square_sums(plan, before))
    limit = float(np.median(norms)) if plan.num_bins > 1 else float(norms[0]) / 2
    gs.GradientSplitter(model, plan, gs.Fixed(limit)).step()
    after = [p.grad for p in trainable(model)]
    assert (np.sqrt(square_sums(plan, after)) <= limit * (1 + 1e-5)).all()
    over = norms > limit * (1 + 1e-5)
    assert over.any()
    for labels, was, now in zip(label_elements(plan), before, after, strict=True):
        if was is not None:
            kept = torch.from_numpy(norms[labels] <= limit * (1 - 1e-5))
            assert torch.equal(was[kept], now[kept])


@EVERY
@EACH
def test_no_bin_moves_by_more_than_its_share_in_a_step_of_gso_that_goes_on_from_a_file(name, strategy):
    architecture, plan = ARCHITECTURES[name], plan_of(name, strategy)

    def begun():
        model = architecture.build()
        return model, gs.GSO(model, lr=0.1, plan=plan, weight_decay=0.0, direction="adam")

    def step(model, optimizer):
        architecture.backward(model)
        optimizer.step()

    (whole, optimizer), (resumed, other) = begun(), begun()
    start = [p.detach().clone() for p in trainable(whole)]
    step(whole, optimizer)
    moved = np.sqrt(square_sums(plan, [p - s for p, s in zip(trainable(whole), start, strict=True)]))
    allowed = TAU * np.maximum(np.sqrt(square_sums(plan, start)), 0.01 * np.sqrt(plan.numel_B))
    assert (moved <= allowed * (1 + 1e-4)).all()
    assert moved.max() > 0
    resumed.load_state_dict(kept_in_a_file(whole.state_dict()))
    other.load_state_dict(kept_in_a_file(optimizer.state_dict()))
    step(whole, optimizer)
    step(resumed, other)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@EVERY
@EACH
def test_a_splitters_history_and_its_plan_go_on_from_a_file(name, strategy):
    architecture = ARCHITECTURES[name]

    def begun():
        model = architecture.build()
        return model, gs.GradientSplitter(model, strategy, gs.Percentile(0.1, eta=0.5))

    model, splitter = begun()
    if STRATEGIES[strategy].needs_energy:
        splitter.calibrate(lambda: architecture.backward(model), steps=2)
    architecture.backward(model)
    splitter.step()
    other_model, other = begun()
    other.load_state_dict(kept_in_a_file(splitter.state_dict()))
    for one, control in ((model, splitter), (other_model, other)):
        architecture.backward(one)
        control.step()
    for a, b in zip(trainable(model), trainable(other_model), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def row_of(name):
    """The cells of the model's row in the table of the documentation."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    layout = gs.layout_of(model)
    first = dict(model.named_parameters())
    ties = [f"`{alias}`" for alias, _ in model.named_parameters(remove_duplicate=False) if alias not in first]
    frozen = sum(not p.requires_grad for p in model.parameters())
    bins = [plan_of(name, strategy).num_bins for strategy in STRATEGIES]
    cells = [name, architecture.what, len(layout), f"{layout.num_elements:,}", frozen, *bins, ", ".join(ties) or "none"]
    return [str(cell) for cell in cells]


def table():
    """The cells of every row of the documentation's table, its head first."""
    lines = [line for line in PAGE.read_text(encoding="utf8").splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines]


HEAD = ["model", "what it is", "tensors", "elements", "frozen", *(f"`{s}`" for s in STRATEGIES), "tied to another name"]


def test_the_table_of_models_has_a_row_for_each():
    head, *rows = table()
    assert head == HEAD
    assert [row[0] for row in rows] == list(ARCHITECTURES)


@EVERY
def test_the_table_of_models_is_what_the_plans_say(name):
    """Cuts that follow energies may fall one way or the other where a gain is as good as the smallest allowed."""
    found, expected = row_of(name), {row[0]: row for row in table()}.get(name, [""] * len(HEAD))
    near = HEAD.index("`lbf`")
    message = f"{PAGE.name} should have the row\n| {' | '.join(found)} |"
    assert found[:near] + found[near + 1 :] == expected[:near] + expected[near + 1 :], message
    assert abs(int(found[near]) - int(expected[near])) <= 0.1 * int(found[near]), message


@EVERY
def test_a_tied_weight_is_controlled_once_under_its_first_name(name):
    model = ARCHITECTURES[name].build()
    names = dict(model.named_parameters(remove_duplicate=False))
    planned = gs.layout_of(model).names
    assert len({id(names[n]) for n in planned}) == len(planned)
    assert {id(p) for p in trainable(model)} == {id(names[n]) for n in planned}
