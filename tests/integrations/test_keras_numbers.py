"""A splitting optimizer in Keras gives the scales and weights of PyTorch's, on whatever backend the process has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradsplit as gs
from tests.functional import in_torch, share_runs
from tests.functional.cases import CASES, LR, MOMENTUM, gradients, pace_at, turned, turned_back

keras = pytest.importorskip("keras")

from gradsplit.integrations import keras as gsk  # noqa: E402 - needs the line above
from gradsplit.integrations.keras import layout, state  # noqa: E402
from tests.integrations.keras_cases import last_scales, tensors, values, variables  # noqa: E402

NUM_STEPS = 50


def rate_at(step, momentum):
    """Falling without momentum: Keras' velocity holds the rates of its past, torch's does not."""
    return LR if momentum else LR * pace_at(step)


def keras_run(name, momentum, num_steps=NUM_STEPS):
    """Scales and weights of split SGD."""
    case, held = CASES[name], variables()
    sgd = keras.optimizers.SGD(LR, momentum=momentum)
    optimizer = gsk.split(sgd, case.plan(), case.budget, rule=case.rule)
    scales = []
    for step in range(num_steps):
        optimizer.learning_rate = rate_at(step, momentum)
        optimizer.apply(tensors(turned(gradients(step))), held)
        scales.append(last_scales(optimizer))
    return np.stack(scales), turned_back(values(held))


def torch_run(name, momentum, num_steps=NUM_STEPS):
    """The same by GradientSplitter and torch's SGD."""
    case, pairs = CASES[name], in_torch.parameters()
    sgd = torch.optim.SGD([p for _, p in pairs], lr=LR, momentum=momentum)
    splitter = gs.GradientSplitter(pairs, case.plan(), case.budget, optimizer=sgd, rule=case.rule, backend="reference")
    scales = []
    for step in range(num_steps):
        sgd.param_groups[0]["lr"] = rate_at(step, momentum)
        for (_, parameter), gradient in zip(pairs, gradients(step), strict=True):
            parameter.grad = torch.from_numpy(gradient)
        scales.append(splitter.step().decision.scale_B.numpy())
        sgd.step()
    return np.stack(scales), [p.detach().numpy() for _, p in pairs]


RUNS = ["xsp / relative_step", "lbf / ema", "tree_sp over rows / every budget / bottom_up", "xsp, columns / relative"]


def disagreement(name, momentum=MOMENTUM, num_steps=NUM_STEPS):
    """The largest difference of scales, and of weights in units of their size."""
    (ours, held), (theirs, expected) = keras_run(name, momentum, num_steps), torch_run(name, momentum, num_steps)
    apart = [np.abs(a - b).max() / max(np.abs(b).max(), 1.0) for a, b in zip(held, expected, strict=True)]
    return np.abs(ours - theirs).max(), max(apart)


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
@pytest.mark.parametrize("name", RUNS)
def test_scales_and_weights_are_those_of_torch(name, momentum):
    scales, moved = disagreement(name, momentum)
    assert scales <= 2e-6  # both sides move float32 weights, which differ in their last bit
    assert moved <= 1e-5


def test_a_planted_fault_of_the_momentum_is_caught(monkeypatch):
    monkeypatch.setattr(state.Rates, "reach", lambda self, rate: rate)
    assert disagreement("xsp / relative_step", num_steps=2)[0] > 1e-3


def test_a_planted_fault_of_the_history_is_caught(monkeypatch):
    write = state.Kept.write
    # Ema keeps three vectors.
    monkeypatch.setattr(state.Kept, "write", lambda self, now: None if len(self.variables) == 3 else write(self, now))
    with pytest.raises(AssertionError):
        assert disagreement("lbf / ema", num_steps=6)[0] <= 2e-6


def test_a_planted_fault_of_the_orientation_is_caught(monkeypatch):
    monkeypatch.setattr(layout, "_axes_of", lambda name, shape: (0,) if len(shape) > 1 else ())
    with pytest.raises(ValueError, match="expected a plan of this model"):
        keras_run("xsp / relative_step", MOMENTUM, 1)


@pytest.mark.parametrize("second_moment", ["element", "bin"])
def test_a_run_of_gso_ends_at_torch_s_weights(second_moment):
    held = variables()
    optimizer = gsk.GSO(in_torch.GSO_LR, direction="adam", second_moment=second_moment)
    for step in range(in_torch.GSO_STEPS):
        if step:  # the first step is made at the rate of the constructor
            optimizer.learning_rate = in_torch.GSO_LR * pace_at(step)
        optimizer.apply(tensors(turned(in_torch.gso_gradients(step, turned_back(values(held))))), held)
    for ours, theirs in zip(turned_back(values(held)), in_torch.after_gso(second_moment), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def share_variables():
    """The variables of the share runs, float64, under the names of Keras' layers; output units last."""
    arrays = share_runs.turned(share_runs.weights())
    names = [name.replace("embedding", "embeddings") for name in share_runs.SHAPES]
    return [keras.Variable(array, dtype="float64", name=name) for name, array in zip(names, arrays, strict=True)]


def share_distance(resume_at=None, **options):
    """How far the weights are from torch's over twelve steps by shares; a new optimizer goes on where asked."""
    held, far = share_variables(), 0.0
    options = {"blocks": share_runs.BLOCKS, **options}
    optimizer = gsk.GSO(share_runs.SHARE, **options)
    for step in range(share_runs.STEPS):
        if step == resume_at:
            old, optimizer = optimizer, gsk.GSO.from_config(optimizer.get_config())
            optimizer.build(held)
            for new, saved in zip(optimizer.variables, old.variables, strict=True):
                new.assign(saved)
        given = share_runs.turned(share_runs.gradients(step, share_runs.turned_back(values(held))))
        optimizer.apply([keras.ops.convert_to_tensor(g, dtype="float64") for g in given], held)
        far = max(far, share_runs.distance(share_runs.turned_back(values(held)), share_runs.in_torch()[0][step]))
    return far


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="float64 is off there by default")
@pytest.mark.parametrize("resume_at", [None, 5])
def test_twelve_steps_by_shares_are_those_of_torch_s_gso(resume_at):
    # The learning rate is a float32 variable in Keras: the share is 0.1 to its last bit alone.
    assert share_distance(resume_at) < 1e-6


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="float64 is off there by default")
@pytest.mark.parametrize("options", [{"blocks": None}, {"kinds": {"token.*": "matrix"}}, {"beta_2": 0.999}])
def test_a_planted_fault_of_the_share_step_is_caught(options):
    assert share_distance(**options) > 1e-4
