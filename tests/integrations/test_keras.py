"""A splitting optimizer beside Keras' own options: scaled losses, accumulated, missing or broken gradients, rates."""

from __future__ import annotations

import numpy as np
import pytest

import gradsplit as gs

keras = pytest.importorskip("keras")

from gradsplit.integrations import keras as gsk  # noqa: E402 - needs the line above
from tests.integrations.keras_cases import BOUNDED, UNITS, one_step, tensors, values  # noqa: E402


def fixed(optimizer):
    return gsk.split(optimizer, budget=gs.Fixed(1.0))


def test_each_unit_keeps_at_most_its_limit():
    np.testing.assert_allclose(one_step(fixed(keras.optimizers.SGD(1.0)), UNITS), -BOUNDED, rtol=1e-6)


def test_a_unit_that_is_not_finite_is_zeroed_and_no_other_feels_it():
    broken = UNITS.copy()
    broken[0, 1] = np.nan
    optimizer = fixed(keras.optimizers.SGD(1.0))
    np.testing.assert_allclose(one_step(optimizer, broken), -BOUNDED * [1.0, 0.0, 1.0], rtol=1e-6)
    assert optimizer.split_report.counts().tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    worst = optimizer.split_report.record(0).worst(1)[0]
    assert (worst.name, worst.outcome, worst.norm_after) == ("kernel[1:2]", gs.Outcome.ZEROED, 0.0)
    assert not np.isfinite(worst.norm)


def test_clipnorm_acts_on_what_was_bounded():
    bounded = one_step(fixed(keras.optimizers.SGD(1.0, clipnorm=0.5)), UNITS)
    np.testing.assert_allclose(bounded, -BOUNDED * 0.5 / np.sqrt(2.25), rtol=1e-5)


def test_a_loss_scale_is_taken_out_before_bounding():
    optimizer = fixed(keras.optimizers.SGD(1.0, loss_scale_factor=1024.0))
    np.testing.assert_allclose(one_step(optimizer, 1024.0 * UNITS), -BOUNDED, rtol=1e-6)


def test_inside_a_loss_scale_optimizer_the_unscaled_gradient_is_bounded():
    optimizer = keras.optimizers.LossScaleOptimizer(fixed(keras.optimizers.SGD(1.0)), initial_scale=256.0)
    np.testing.assert_allclose(one_step(optimizer, 256.0 * UNITS), -BOUNDED, rtol=1e-6)


def test_accumulated_gradients_are_bounded_once_when_their_sum_is_complete():
    optimizer = fixed(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
    held = [keras.Variable(np.zeros((2, 3), "float32"), name="kernel")]
    optimizer.apply(tensors([2 * UNITS]), held)
    assert optimizer.split_report.counts().sum() == 0
    np.testing.assert_array_equal(values(held)[0], 0)
    optimizer.apply(tensors([np.zeros((2, 3))]), held)
    np.testing.assert_allclose(values(held)[0], -BOUNDED, rtol=1e-6)
    assert optimizer.split_report.counts().tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_a_variable_that_the_loss_does_not_reach_stays_and_counts_nothing():
    optimizer = gsk.split(keras.optimizers.SGD(1.0), budget={"root": gs.Fixed(1.0)})
    held = [keras.Variable(np.ones(2, "float32"), name="a"), keras.Variable(np.ones(2, "float32"), name="b")]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, *tensors([[3.0, 4.0]])], held)
    np.testing.assert_allclose(values(held), [[1.0, 1.0], [0.4, 0.2]], rtol=1e-6)


def test_the_step_follows_a_schedule_down_but_not_up():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.5, 1.0, 0.25])
    optimizer = gsk.split(keras.optimizers.SGD(schedule), budget=gs.RelativeStep(0.1))
    held, lengths = [keras.Variable(np.array([[3.0], [4.0]], "float32"), name="kernel")], []
    for _ in range(3):
        before = values(held)[0]
        optimizer.apply(tensors([[[300.0], [400.0]]]), held)
        lengths.append(np.linalg.norm(values(held)[0] - before) / np.linalg.norm(before))
    np.testing.assert_allclose(lengths, [0.1, 0.1, 0.025], rtol=1e-4)


def test_capped_updates_move_no_unit_by_more_than_its_share():
    start = np.array([[3.0, 30.0, 0.0], [4.0, 40.0, 0.0]], "float32")
    optimizer = gsk.split("adam", budget=gs.RelativeStep(0.01), cap_updates=True)
    optimizer.learning_rate = 0.1
    moved = one_step(optimizer, UNITS, start) - start
    # Adam's first step is 0.1 an entry; limits .05, .5 and .01 * .01 * sqrt(2)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=0), [0.05, 0.1 * 2**0.5, 1e-4 * 2**0.5], rtol=1e-3)


def test_an_unbounded_split_leaves_adam_as_it_is():
    gradient = UNITS.astype(np.float32)
    plain = one_step(keras.optimizers.Adam(0.1), gradient)
    np.testing.assert_array_equal(
        one_step(gsk.split(keras.optimizers.Adam(0.1), budget=gs.Fixed(1e30)), gradient), plain
    )


OPTIMIZERS = ["adam", "adamw", "nadam", "adamax", "adagrad", "adadelta", "rmsprop", "ftrl", "lion", "adafactor", "muon"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_in_front_of_others_keeps_faults_in_their_rows(name):
    """The three lines work in front of every optimizer of Keras; a broken unit becomes zero and disturbs no other."""
    kind = type(keras.optimizers.get(name))
    broken = np.where(np.arange(3) == 1, np.nan, UNITS)
    start = np.full((2, 3), 0.5, "float32")
    optimizer = gsk.split(kind(learning_rate=0.1))
    moved = one_step(optimizer, broken, start) - start
    assert np.isfinite(moved).all()
    assert optimizer.split_report.counts()[1].tolist() == [0.0, 1.0, 0.0]
    limit = np.linalg.norm(start, axis=0)[0]
    np.testing.assert_allclose(optimizer.split_report.record(0).decision.limit_B.numpy(), limit, rtol=1e-6)


def test_a_batch_times_a_thousand_enters_adam_s_memory_as_a_usual_one():
    gradient = np.random.default_rng(0).standard_normal((4, 40)).astype("float32")
    start = np.full((4, 40), 100.0, "float32")  # limits of 200, far above
    plain, ours = keras.optimizers.Adam(0.1), gsk.split(keras.optimizers.Adam(0.1))
    held = [[keras.Variable(start, name="kernel")] for _ in range(2)]
    for step in range(12):
        plain.apply(tensors([gradient]), held[0])
        ours.apply(tensors([gradient * (1000.0 if step == 9 else 1.0)]), held[1])
    np.testing.assert_allclose(values(held[1])[0], values(held[0])[0], rtol=1e-5)
    assert ours.get_config()["collective"] is True
    again = type(ours).from_config(ours.get_config())
    assert again.get_config() == ours.get_config()


def test_the_default_in_front_of_sgd_bounds_the_step():
    optimizer = gsk.split(keras.optimizers.SGD(0.1))
    assert optimizer.get_config()["collective"] is False
    moved = one_step(optimizer, UNITS)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=0), [0.03, 0.03, 0.03], rtol=1e-5)
