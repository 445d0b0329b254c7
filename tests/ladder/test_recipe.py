"""Recipes against exact arithmetic on whole numbers."""

from __future__ import annotations

import csv
import math
from collections import Counter
from importlib import resources

import numpy as np
import pytest

from gradsplit.ladder import climb_figure, climb_rows, recipe_of
from gradsplit.ladder.recipe import RecipeStep, climb
from gradsplit.ladder.signedlog import SignedLog

# L(t) = 5 + 2 t + 3 t^2 - t^3 + 7 t^4, and its first derivatives at 0: 2, 6, -6, 168
COEFFICIENTS = [5, 2, 3, -1, 7]


def _ladder(*columns):
    return SignedLog.of(np.array(columns, dtype=np.float64).T)


def _exact(steps, coefficients, length):
    """The same recipe on lists of Python integers; a gradient divides by the length."""
    q, values, length_power = list(coefficients), [], 0
    for step in steps:
        if step.operator in ("derivative", "gradient"):
            q = [k * c for k, c in enumerate(q)][1:]
            length_power += step.operator == "gradient"
        else:
            exponent = 2 if step.operator == "square" else 3
            out = q
            for _ in range(exponent - 1):
                out = [sum(out[i] * q[k - i] for i in range(k + 1)) for k in range(len(q))]
            q, length_power = out, length_power * exponent
        values.append((q[0], length_power * math.log(length)))
    return values


def test_the_preset_is_the_list_of_292_steps():
    steps = recipe_of("ladder-292")
    assert Counter(step.operator for step in steps) == {"derivative": 2, "gradient": 2, "square": 135, "cube": 153}
    assert [steps[i] for i in (0, 118, 119, 291)] == [
        RecipeStep("derivative", None, 1),
        RecipeStep("cube", 98, 99),
        RecipeStep("square", 99, 1),
        RecipeStep("cube", 1, None),
    ]
    said = [step.order_out for step in steps if step.order_out is not None]
    assert max(said) == 99


def test_the_preset_ships_inside_the_package():
    text = resources.files("gradsplit.ladder").joinpath("ladder-292.csv").read_text()
    assert [int(row["step"]) for row in csv.DictReader(text.splitlines())] == list(range(1, 293))


@pytest.mark.parametrize("length", [1.0, 0.25])
def test_the_first_steps_of_the_preset_are_exact(length):
    steps = recipe_of("ladder-292")[:12]
    found = climb(steps, _ladder(COEFFICIENTS), np.array([length]))
    for s, (number, log_length) in enumerate(_exact(steps, COEFFICIENTS, length)):
        assert found.value.sign[s, 0] == np.sign(number)
        assert found.value.log[s, 0] == pytest.approx(math.log(abs(number)) - log_length, rel=1e-12)
    assert found.order_true.tolist() == [1, 2, 3, 3, 4] + [4] * 7


def test_all_292_steps_are_a_number_to_the_power_2_135_3_153():
    """Steps 1 to 5 leave d((f''')^2)/dt = 2 f''' f'''' per length; 134 squares and 153 cubes follow."""
    found = climb("ladder-292", _ladder(COEFFICIENTS), np.ones(1))
    start = 2 * 6 * 168  # in magnitude: f''' = -6, f'''' = 168
    exact = math.log(start) * 2**134 * 3**153
    assert found.value.log[-1, 0] == pytest.approx(exact, rel=1e-12)
    assert found.value.sign[4, 0] == -1
    assert found.value.sign[-1, 0] == 1
    assert np.isfinite(found.value.log).all()


def test_derivatives_after_powers_follow_the_product_rule():
    recipe = ["derivative", "cube", "derivative", "square", "gradient"]
    steps = recipe_of(recipe)
    found = climb(recipe, _ladder(COEFFICIENTS), np.array([2.0]))
    for s, (number, log_length) in enumerate(_exact(steps, COEFFICIENTS, 2.0)):
        assert found.value[s, 0].to_float() == pytest.approx(number * math.exp(-log_length), rel=1e-12)


def test_bins_are_climbed_side_by_side():
    other = [1, -4, 2, 1, 1]
    both = climb("ladder-292", _ladder(COEFFICIENTS, other), np.array([1.0, 3.0]))
    alone = climb("ladder-292", _ladder(other), np.array([3.0]))
    np.testing.assert_array_equal(both.value.log[:, 1:], alone.value.log)
    np.testing.assert_array_equal(both.value.sign[:, 1:], alone.value.sign)


def test_where_float32_and_float64_die():
    """2016 -> cube, square, cube, square …: its powers pass 3.4e38 and 1.8e308 at known steps."""
    found = climb("ladder-292", _ladder(COEFFICIENTS), np.ones(1))
    for arithmetic, largest in (("float32", 3.4e38), ("float64", 1.79e308)):
        first = int(np.argmax(found.value.log10[:, 0] > math.log10(largest))) + 1
        assert found.died_B(arithmetic).tolist() == [first]
    small = climb("ladder-292", _ladder([0, 1e-3, 1e-3, 1e-3, 1e-3]), np.ones(1))
    assert (small.died_B("float32") > 0).all()
    assert small.float32[-1, 0] == 0
    assert np.isfinite(small.value.log).all()


def test_the_true_derivatives_stand_beside_the_said_orders():
    found = climb("ladder-292", _ladder(COEFFICIENTS), np.ones(1))
    assert found.said[0, 0].to_float() == pytest.approx(2)  # said order 1
    assert found.said[1, 0].to_float() == pytest.approx(6)  # said order 2
    assert np.isnan(found.said.sign[3, 0])  # a square that says no order
    assert found.said[5, 0].to_float() == pytest.approx(168)  # a cube, said to be of order 4
    assert np.isnan(found.said.sign[6, 0])  # order 5 is beyond this ladder


def test_a_zero_derivative_is_no_death():
    found = climb(["derivative", "square", "cube"], _ladder([1, 0, 1]), np.ones(1))
    assert found.value.sign.tolist() == [[0], [0], [0]]
    assert found.died_B("float32").tolist() == [0]


def test_rows_and_figure_of_a_climb():
    found = climb("ladder-292", _ladder(COEFFICIENTS), np.ones(1))
    rows = climb_rows(found)
    assert len(rows) == 292
    assert rows[5]["said"] == "3 -> 4"
    assert rows[5]["true order"] == "4"
    assert rows[5]["derivative of the said order"] == "+1.68e+2"
    figure = climb_figure(found)
    assert len(figure["data"][0]["x"]) == 292
    assert {note["text"] for note in figure["layout"]["annotations"]} == {"float32 dies", "float64 dies"}


def test_what_a_recipe_may_not_be():
    with pytest.raises(ValueError, match=r"recipe='cube': expected one of ladder-292 .*recipe=\[\"cube\"\]"):
        recipe_of("cube")
    with pytest.raises(ValueError, match=r"got 'root' at step 2"):
        recipe_of(["square", "root"])
    with pytest.raises(ValueError, match=r"expected at most the ladder's order, 1\. Pass order=2"):
        climb(["derivative", "derivative"], _ladder([1, 2]), np.ones(1))
