"""LoRA by peft: only adapters are planned and moved, merging stays exact, and freezing in mid-run disturbs nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import gradsplit as gs
from tests.integrations.tiny_models import ARCHITECTURES
from tests.laws.oracles import square_sums

# peft 0.21 asks transformers 5.23 by the old name; goes with the next peft.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LLAMA = ARCHITECTURES["Llama"]
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def with_adapters(**options):
    """The tiny Llama with adapters on queries and values, dropout off."""
    base = LLAMA.build()
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{**CONFIG, **options})).eval()


def base_of(model):
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


def loss_of(model):
    with torch.no_grad():
        return float(model(**LLAMA.batch).loss)


def sgd_with_splitter(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5, momentum=0.9)
    splitter = gs.GradientSplitter(model)
    splitter.attach(optimizer)
    return optimizer, splitter.layout


def adamw_with_splitter(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    splitter = gs.GradientSplitter(model, cap_updates=True)
    splitter.attach(optimizer)
    return optimizer, splitter.layout


def gso(model):
    optimizer = gs.GSO(model, lr=0.1, weight_decay=0.0, direction="adam")
    return optimizer, gs.layout_of(model)


def gso_with_one_second_moment_a_row(model):
    optimizer = gs.GSO(model, lr=0.1, weight_decay=0.0, second_moment="bin", direction="adam")
    return optimizer, gs.layout_of(model)


@pytest.mark.parametrize("make", [sgd_with_splitter, adamw_with_splitter, gso, gso_with_one_second_moment_a_row])
def test_only_adapters_are_planned_and_moved_and_the_loss_falls(make):
    model = with_adapters()
    before, first = copy.deepcopy(base_of(model)), loss_of(model)
    optimizer, layout = make(model)
    assert len(layout) == 8, "A and B for queries and values of two blocks"
    assert all(".lora_" in name for name in layout.names)
    for _ in range(40):
        LLAMA.backward(model)
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in base_of(model).items())
    assert loss_of(model) < first - 0.005


@pytest.mark.parametrize("make", [sgd_with_splitter, gso])
def test_merged_weights_are_base_plus_the_trained_product(make, tmp_path):
    model = with_adapters()
    optimizer, _ = make(model)
    for _ in range(10):
        LLAMA.backward(model)
        optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    trained = loss_of(model)
    assert loss_of(again) == trained
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (4 / 2)
    expected = layer.base_layer.weight.detach() + product.detach()
    assert product.abs().max() > 0
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight.detach(), expected)
    assert loss_of(merged) == pytest.approx(trained, abs=1e-6)


def test_an_adapter_that_starts_at_zero_moves_by_the_floor_of_the_default_budget():
    """B starts at zero: 3 % of a length of 0.01 an entry, not of nothing."""
    model = with_adapters()
    optimizer = gs.GSO(model, lr=0.1, weight_decay=0.0, direction="adam")
    LLAMA.backward(model)
    optimizer.step()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            moved = p.norm(dim=1)
            largest = 0.03 * 0.01 * p.shape[1] ** 0.5
            assert (moved <= largest * (1 + 1e-5)).all()
            assert moved.max() >= largest * 0.999


def freeze(model, part, frozen=True):
    for name, p in model.named_parameters():
        if part in name:
            p.requires_grad_(not frozen)
            p.grad = None


def test_freezing_and_unfreezing_in_mid_run_leaves_the_frozen_history_as_it_was():
    model = with_adapters()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    splitter = gs.GradientSplitter(model, budget=gs.Percentile(0.1, eta=0.5))
    splitter.attach(optimizer)

    def steps(count):
        for _ in range(count):
            LLAMA.backward(model)
            optimizer.step()
        limits = splitter.ledger.decide(splitter.kernel.squares([None] * 8)).limit_B
        return limits.clone(), [p.detach().clone() for p in splitter.parameters]

    names = splitter.layout.names
    of_a = np.array(["lora_A" in b.name for b in splitter.plan.bins])

    def moved(before, after):
        return {name.split(".")[-3] for name, a, b in zip(names, before, after, strict=True) if not torch.equal(a, b)}

    history_1, weights_1 = steps(4)
    freeze(model, "lora_A")
    history_2, weights_2 = steps(4)
    assert moved(weights_1, weights_2) == {"lora_B"}
    assert torch.equal(history_2[of_a], history_1[of_a]), "no gradient is no observation"
    assert not torch.equal(history_2[~of_a], history_1[~of_a])
    freeze(model, "lora_A", frozen=False)
    history_3, weights_3 = steps(4)
    assert moved(weights_2, weights_3) == {"lora_A", "lora_B"}
    assert not torch.equal(history_3[of_a], history_2[of_a])


def test_what_is_trainable_when_the_splitter_is_made_is_bounded_from_the_step_it_is_thawed():
    model = LLAMA.build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    splitter = gs.GradientSplitter(model, "per_tensor", gs.Fixed(1e-3))
    splitter.attach(optimizer)
    freeze(model, "model.layers")
    LLAMA.backward(model)
    optimizer.step()
    assert all(p.grad is None for name, p in model.named_parameters() if "model.layers" in name)
    freeze(model, "model.layers", frozen=False)
    LLAMA.backward(model)
    assert max(square_sums(splitter.plan, [p.grad for p in splitter.parameters])) > 1e-3**2
    optimizer.step()
    norms = np.sqrt(square_sums(splitter.plan, [p.grad for p in splitter.parameters]))
    assert (norms <= 1e-3 * (1 + 1e-5)).all()
    assert (norms > 0).all()


def test_parameters_thawed_later_are_updated_and_leave_the_others_where_they_were():
    """The adapters' next step is that of a run in which nothing was thawed."""
    runs = []
    for thaws in (False, True):
        model = with_adapters()
        optimizer = gs.GSO(model, lr=0.01, budget=(gs.Percentile(0.1, eta=0.5), gs.RelativeStep()), direction="adam")
        for _ in range(3):
            LLAMA.backward(model)
            optimizer.step()
        if thaws:
            freeze(model, "lm_head", frozen=False)
        LLAMA.backward(model)
        optimizer.step()
        runs.append(dict(model.named_parameters()))
    for name, p in runs[0].items():
        assert torch.equal(p, runs[1][name]) is ("lm_head" not in name), name
