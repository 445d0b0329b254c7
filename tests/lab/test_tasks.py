"""What every row of the registry promises: shapes, determinism, a loss that can be reduced, scores in range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gradsplit.lab import REGISTRY, Task, workload
from gradsplit.lab.task import generator, seeded, stream_seed

# Smaller than the defaults where that changes nothing of what is tested; healthy where a few plain steps must help.
SMALL: dict[str, dict[str, Any]] = {
    "detection": {"batch": 8, "width": 8, "healthy": True},
    "aerial": {"batch": 4, "width": 8, "healthy": True},
    "gpt": {"layers": 1, "width": 32, "heads": 2, "context": 32, "batch": 8},
    "lstm": {"width": 32, "context": 32, "batch": 8},
    "temporal-order": {"length": 10, "hidden": 20},
    "adding": {"length": 10, "hidden": 20},
    "deep-stack": {"max_channels": 4, "batch": 8},
    "residual-stack": {"blocks": 6, "channels": 8, "gain": 0.5},
    "plain-stack": {"depth": 4, "channels": 8},
    "experts": {"layers": 1, "width": 32, "heads": 2, "context": 32, "batch": 8},
    "adapters": {"rank": 4, "base_steps": 5},
    "diffusion": {"width": 16, "stages": 1, "batch": 16},
    "control": {"hidden": 16},
}
# The deep stack is the hostile case: nobody promises that a few steps reduce its loss. PPO's loss is none to reduce.
# Adapters of a base that has hardly been trained have nothing to adapt.
TRAINABLE = [name for name in SMALL if name not in ("deep-stack", "control", "adapters")]
ADAM_LR = {"temporal-order": 1e-2, "adding": 1e-2}


def small(name: str, seed: int = 0) -> Task:
    return REGISTRY[name].build(seed, **SMALL[name])


def test_every_always_present_row_is_tested() -> None:
    assert set(SMALL) == set(REGISTRY) - {"spoken-digits"}


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_weights_and_batches_whatever_the_global_generator(name: str) -> None:
    torch.manual_seed(1)
    first = small(name, seed=3)
    early, late = first.batch(2), first.batch(7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = small(name, seed=3)
    late_again, early_again = second.batch(7), second.batch(2)
    assert torch.equal(before, torch.get_rng_state())
    weights = second.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in first.model.state_dict().items())
    for a, b in zip(early + late, early_again + late_again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_another_seed_or_step_gives_other_weights_and_batches(name: str) -> None:
    first, other = small(name, seed=0), small(name, seed=1)
    pairs = zip(first.model.parameters(), other.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    for a, b in ((first.batch(0), other.batch(0)), (first.batch(0), first.batch(1))):
        assert a[0].shape[0] == b[0].shape[0]
        assert a[0].shape != b[0].shape or not torch.equal(a[0], b[0])


@pytest.mark.parametrize("name", SMALL)
def test_first_loss_is_a_finite_float32_scalar_and_every_parameter_gets_a_gradient(name: str) -> None:
    task = small(name)
    loss = task.loss(task.model, task.batch(0))
    assert loss.shape == () and loss.dtype == torch.float32 and math.isfinite(loss.item())
    loss.backward()
    trained = [p for p in task.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_usual_size_starts_with_a_finite_loss(name: str) -> None:
    task = REGISTRY[name].build(0)
    with torch.no_grad():
        assert math.isfinite(task.loss(task.model, task.batch(0)).item())


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_few_steps_reduce_the_loss(name: str) -> None:
    task = small(name)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=ADAM_LR.get(name, 3e-3))
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step % 4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_gives_the_metric_twice_the_same_and_changes_nothing(name: str) -> None:
    task, row = small(name), REGISTRY[name]
    task.model.train()
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    scores = task.evaluate(task.model)
    assert task.evaluate(task.model) == scores
    assert row.metric in scores and all(isinstance(value, float) for value in scores.values())
    upper = math.inf if row.metric == "val_loss" else 1.0
    assert all(0.0 <= value <= upper for value in scores.values())
    assert task.model.training
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_diverged_model_is_scored_and_not_an_error(name: str) -> None:
    task, row = small(name), REGISTRY[name]
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.fill_(math.nan)
    value = task.evaluate(task.model)[row.metric]
    assert (value == 0.0 or math.isnan(value)) if row.higher_is_better else (value == 1.0 or math.isnan(value))


@pytest.mark.parametrize("row", REGISTRY.values(), ids=list(REGISTRY))
def test_a_row_says_what_to_expect(row: Any) -> None:
    assert REGISTRY[row.name] is row and workload(row.name) is row
    assert row.optimizer in {"sgdm", "sgd", "adam", "adamw"} and row.lr > 0 and row.steps > 0
    assert math.isfinite(row.expected.value) and row.expected.seconds > 0
    assert "seed" in row.expected.conditions and "20" in row.expected.conditions
    assert row.title and row.data_note


def test_every_option_of_a_row_is_an_argument_of_its_build() -> None:
    import inspect

    for row in REGISTRY.values():
        arguments = set(inspect.signature(row.build).parameters) - {"seed"}
        assert set(row.options) == arguments


def test_unknown_row_is_an_error_that_lists_the_rows() -> None:
    with pytest.raises(ValueError, match=r"workload\('detektion'\): expected one of adapters, adding, aerial") as error:
        workload("detektion")
    assert "residual-stack" in str(error.value)


def test_to_moves_model_and_batches_and_returns_the_task() -> None:
    task = small("plain-stack")
    assert task.to("meta") is task
    assert all(p.device.type == "meta" for p in task.model.parameters())
    assert all(part.device.type == "meta" for part in task.batch(0))


def test_better_follows_the_metric_and_never_prefers_a_non_finite_score() -> None:
    up, down = REGISTRY["detection"], REGISTRY["gpt"]
    assert up.better(0.3, 0.2) and not up.better(0.2, 0.3)
    assert down.better(1.0, 2.0) and not down.better(2.0, 1.0)
    for row in (up, down):
        assert row.better(0.0, math.nan) and not row.better(math.nan, 0.0) and not row.better(math.inf, 0.0)
        assert not row.better(math.nan, math.inf)


def test_streams_of_a_seed_are_apart() -> None:
    seeds = {stream_seed(seed, stream, step) for seed in range(20) for stream in (1, 2, 3) for step in range(100)}
    assert len(seeds) == 20 * 3 * 100
    assert all(0 <= value < 2**63 for value in seeds)
    a = torch.rand(4, generator=generator(0, 1, 0))
    assert not torch.equal(a, torch.rand(4, generator=generator(0, 1, 1)))
    with seeded(0), pytest.raises(KeyError), seeded(1):
        raise KeyError  # the outer generator comes back even then
