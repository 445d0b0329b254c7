"""One ladder per bin: each equals the ladder of its own direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.ladder import directions as directions_module
from gradsplit.ladder import ladder_figure, ladder_of_model, ladder_rows, ladder_table, loss_of_model, taylor_ladder


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    inputs, labels = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    return model, (lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])), (inputs, labels)


def _gradient(model, loss_fn, batch):
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss_fn(model, batch), list(model.parameters())), strict=True))


PLANS = {
    "whole": gs.whole,
    "per tensor": gs.per_tensor,
    "rows": gs.xsp,
    "columns": lambda layout: gs.xsp(layout, parts=2, axis=1),
    "tree": gs.tree_sp,
}


def _direction(plan, b, gradient):
    """Minus the gradient on the boxes of bin b, zero elsewhere: from the bins' own descriptions."""
    moves = {name: torch.zeros_like(g) for name, g in gradient.items()}
    for box in plan.bins[b].boxes:
        g = gradient[box.tensor]
        view = (1, g.numel()) if g.ndim < 2 else (g.shape[0], g[0].numel())
        cells = (slice(box.start[0], box.stop[0]), slice(box.start[1], box.stop[1]))
        moves[box.tensor].view(view)[cells] = -g.reshape(view)[cells]
    return moves


@pytest.mark.parametrize("strategy", PLANS)
def test_every_bin_has_the_ladder_of_its_own_direction(problem, strategy):
    plan = PLANS[strategy](gs.layout_of(problem[0]))
    ladder = ladder_of_model(*problem, bins=plan, order=8)
    assert list(ladder.names) == [b.name for b in plan.bins]
    gradient = _gradient(*problem)
    loss_of_params, params = loss_of_model(*problem)
    for b in range(0, plan.num_bins, 3):
        direction = _direction(plan, b, gradient)
        alone = taylor_ladder(loss_of_params, params, direction, order=8)
        size = np.exp(alone.coefficient.log[:, 0])
        found = ladder.coefficient[:, b].to_float()
        np.testing.assert_allclose(found, alone.coefficient[:, 0].to_float(), rtol=1e-9, atol=1e-13 * size.max())
        assert ladder.length_B[b] == pytest.approx(torch.cat([d.flatten() for d in direction.values()]).norm().item())


def test_a_given_direction_is_restricted_to_every_bin(problem):
    loss_of_params, params = loss_of_model(*problem)
    plan = gs.per_tensor(gs.layout_of(problem[0]))
    given = {name: torch.randn(x.shape, dtype=torch.float64) for name, x in params.items() if name != "2.bias"}
    ladder = taylor_ladder(loss_of_params, params, given, bins=plan, order=5)
    for b, name in enumerate(ladder.names):
        if name == "2.bias":  # not in the direction: it does not move
            assert ladder.length_B[b] == 0 and ladder.safe_step_B[b] == np.inf
            continue
        alone = taylor_ladder(loss_of_params, params, {name: given[name]}, order=5)
        np.testing.assert_allclose(
            ladder.coefficient[:, b].to_float(), alone.coefficient[:, 0].to_float(), rtol=1e-9, atol=1e-13
        )


def test_the_first_derivative_along_minus_the_gradient_is_minus_its_square(problem):
    plan = gs.xsp(gs.layout_of(problem[0]))
    ladder = ladder_of_model(*problem, bins=plan, order=2)
    np.testing.assert_allclose(ladder.derivative.to_float()[1], -(ladder.length_B**2), rtol=1e-12, atol=1e-15)
    assert ladder.loss == pytest.approx(problem[1](problem[0], problem[2]).item(), rel=1e-12)


def test_little_memory_changes_nothing(problem):
    plan = gs.xsp(gs.layout_of(problem[0]))
    ample = ladder_of_model(*problem, bins=plan, order=6)
    scarce = ladder_of_model(*problem, bins=plan, order=6, memory=1)
    assert ample.names == scarce.names
    np.testing.assert_allclose(ample.coefficient.to_float(), scarce.coefficient.to_float(), rtol=1e-9, atol=1e-14)


def test_batches_of_bins_fit_the_memory(problem, monkeypatch):
    sizes = []
    build = directions_module._bins

    def spy(plan, params, gradient, bins, box_indices):
        sizes.append(len(bins))
        return build(plan, params, gradient, bins, box_indices)

    monkeypatch.setattr(directions_module, "_bins", spy)
    plan = gs.xsp(gs.layout_of(problem[0]))
    ladder_of_model(*problem, bins=plan, order=6, memory=20_000)
    few = sizes.copy()
    sizes.clear()
    ladder_of_model(*problem, bins=plan, order=6, memory=100_000_000)
    assert sum(few) == sum(sizes) == plan.num_bins
    assert max(few) <= max(sizes)
    assert len(few) > len(sizes)


def test_a_bin_without_gradient_may_step_for_ever(problem):
    model, loss_fn, batch = problem
    nn.init.zeros_(model[4].weight)  # nothing reaches the layers below
    ladder = ladder_of_model(model, loss_fn, batch, bins=gs.per_tensor(gs.layout_of(model)), order=4)
    dead = ladder.names.index("0.weight")
    assert ladder.safe_step_B[dead] == np.inf
    assert ladder.radius_B[dead] == np.inf


def test_findings_name_the_bins_beyond_their_step(problem):
    ladder = ladder_of_model(*problem, bins=gs.xsp(gs.layout_of(problem[0])), order=12)
    assert ladder.findings(0.0) == []
    worst = int(np.argmin(np.minimum(ladder.safe_step_B, ladder.radius_B)))
    (first, *_rest) = ladder.findings(1e9)
    assert first.startswith(f"{ladder.names[worst]}: radius ")
    assert first.endswith("your step is 1e+09")


def test_table_and_figure_show_the_smallest_steps_first(problem):
    ladder = ladder_of_model(*problem, bins=gs.xsp(gs.layout_of(problem[0])), order=12)
    rows = ladder_rows(ladder, count=4)
    worst = int(np.argmin(np.minimum(ladder.safe_step_B, ladder.radius_B)))
    assert rows[0]["bin"] == ladder.names[worst]
    text = ladder_table(ladder, count=4)
    assert text.splitlines()[0].endswith(f"{len(ladder.names)} bins, {len(ladder.names) - 4} not shown")
    assert len(text.splitlines()) == 6
    assert len(ladder_figure(ladder, count=4)["data"]) == 4


def test_the_prediction_agrees_with_the_true_loss_within_the_radius(problem):
    model, loss_fn, batch = problem
    smooth = nn.Sequential(model[0], model[1], model[2], nn.GELU(), model[4])
    plan = gs.xsp(gs.layout_of(smooth))
    ladder = ladder_of_model(smooth, loss_fn, batch, bins=plan, order=30)
    loss_of_params, params = loss_of_model(smooth, loss_fn, batch)
    gradient = _gradient(smooth, loss_fn, batch)
    step_B = 0.5 * np.where(np.isfinite(ladder.radius_B), ladder.radius_B, 1.0)
    predicted_B = ladder.predict(step_B)
    for b in range(plan.num_bins):
        direction = _direction(plan, b, gradient)
        true = loss_of_params({name: p + step_B[b] * direction[name] for name, p in params.items()})
        assert predicted_B[b] == pytest.approx(true.item(), rel=1e-2), ladder.names[b]


def test_what_taylor_ladder_does_not_take(problem):
    loss_of_params, params = loss_of_model(*problem)
    other = gs.xsp(gs.layout_of(nn.Linear(2, 2)))
    one = {"0.weight": torch.ones(4, 3)}
    for order in (0, 1.5, "x"):
        with pytest.raises(ValueError, match=rf"order={order!r}\): expected a whole number >= 1. Pass the highest"):
            taylor_ladder(loss_of_params, params, one, order=order)
    with pytest.raises(
        TypeError, match=r"params=Linear\): expected a mapping .* Write dict\(model.named_parameters\(\)\)"
    ):
        taylor_ladder(loss_of_params, nn.Linear(2, 2), order=2)
    with pytest.raises(ValueError, match=r"expected a scalar loss, got float. Return a tensor"):
        taylor_ladder(lambda p: 3.0, {"x": torch.ones(2)}, order=2)
    with pytest.raises(ValueError, match=r"expected a scalar loss, got torch.complex128 of shape \(\)"):
        taylor_ladder(lambda p: torch.view_as_complex(p["x"]), {"x": torch.ones(2)}, order=2)
    for bad, said in (
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2).long(), "int64"),
        (2.0, "float"),
    ):
        with pytest.raises(TypeError, match=rf"expected real floating tensors, got (torch\.)?{said} at 'x'"):
            taylor_ladder(lambda p: p["x"].sum(), {"x": bad}, order=2)
    with pytest.raises(ValueError, match=r"expected the plan's tensors among the parameters, got 'weight'"):
        taylor_ladder(loss_of_params, params, bins=other, order=2)
    with pytest.raises(ValueError, match=r"expected shape \(4, 3\), got '0\.weight' of shape \(3,\)"):
        taylor_ladder(loss_of_params, params, {"0.weight": torch.ones(3)}, order=2)
    with pytest.raises(ValueError, match=r"got 'nowhere'"):
        taylor_ladder(loss_of_params, params, {"nowhere": torch.ones(3)}, order=2)
    with pytest.raises(ValueError, match=r"expected at least one tensor"):
        taylor_ladder(loss_of_params, params, {}, order=2)
    with pytest.raises(ValueError, match=r"expected a scalar loss, got shape \(2,\)"):
        taylor_ladder(lambda p: p["x"], {"x": torch.ones(2)}, order=2)
    with pytest.raises(FloatingPointError, match=r"expected a finite loss"):
        taylor_ladder(lambda p: p["x"].log().sum(), {"x": torch.zeros(2)}, {"x": torch.ones(2)}, order=2)
    with pytest.raises(FloatingPointError, match=r"singularity at the parameters"):
        taylor_ladder(lambda p: p["x"].sqrt().sum(), {"x": torch.zeros(2)}, {"x": torch.ones(2)}, order=2)


def test_a_ladder_seeds_no_device(problem, monkeypatch):
    """`torch.manual_seed` would also seed devices, and nothing would restore them."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("it seeds every device"))
    before = torch.get_rng_state()
    loss_of_params, params = loss_of_model(*problem)
    taylor_ladder(loss_of_params, params, order=2)
    assert torch.equal(torch.get_rng_state(), before)
