"""Rows mean output units in Keras, layer by layer."""

from __future__ import annotations

import numpy as np
import pytest

import gradsplit as gs

keras = pytest.importorskip("keras")

from gradsplit.integrations import keras as gsk  # noqa: E402 - needs the line above
from tests.integrations.keras_cases import tensors  # noqa: E402

LAYERS = {
    "Dense": (lambda: keras.layers.Dense(5), (3,), {"kernel": (5, 3), "bias": (5,)}),
    "Conv2D": (lambda: keras.layers.Conv2D(5, (2, 3)), (8, 8, 4), {"kernel": (5, 4, 2, 3)}),
    "Conv2DTranspose": (lambda: keras.layers.Conv2DTranspose(5, 3), (8, 8, 4), {"kernel": (4, 5, 3, 3)}),
    "DepthwiseConv2D": (lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4), {"kernel": (8, 3, 3)}),
    "SeparableConv2D": (
        lambda: keras.layers.SeparableConv2D(5, 3),
        (8, 8, 4),
        {"depthwise_kernel": (4, 3, 3), "pointwise_kernel": (5, 4, 1, 1)},
    ),
    "Embedding": (lambda: keras.layers.Embedding(11, 4), (7,), {"embeddings": (11, 4)}),
    "LSTM": (
        lambda: keras.layers.LSTM(3),
        (7, 4),
        {"kernel": (12, 4), "recurrent_kernel": (12, 3), "bias": (12,)},
    ),
    "GRU": (lambda: keras.layers.GRU(3), (7, 4), {"kernel": (9, 4), "bias": (2, 9)}),
    "LayerNormalization": (lambda: keras.layers.LayerNormalization(), (7, 4), {"gamma": (4,), "beta": (4,)}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_a_layer_are_its_output_units(kind):
    make, shape, expected = LAYERS[kind]
    layer = make()
    layer.build((None, *shape))
    found = gsk.layout_of(layer)
    by_name = {name.rpartition(".")[2]: shape for name, shape in zip(found.names, found.shapes, strict=True)}
    assert {name: by_name[name] for name in expected} == expected


def test_rows_of_attention_are_heads_and_their_units():
    layer = keras.layers.MultiHeadAttention(2, 3, name="attention")
    layer.build((None, 7, 6), (None, 7, 6))
    found = gsk.layout_of(layer)
    shapes = dict(zip((n.rpartition("attention.")[2] for n in found.names), found.shapes, strict=True))
    assert shapes["query.kernel"] == shapes["value.kernel"] == (6, 6)
    assert shapes["attention_output.kernel"][0] == 6


def test_a_named_orientation_goes_before_the_layers_name():
    held = [keras.Variable(np.zeros((3, 3, 4, 2)), name="odd")]
    assert gsk.layout_of(held).shapes == ((2, 4, 3, 3),)
    assert gsk.layout_of(held, {"o*": (-2, -1)}).shapes == ((8, 3, 3),)


def test_two_variables_of_one_path_have_two_names():
    held = [keras.Variable(np.zeros(2), name="w"), keras.Variable(np.zeros(2), name="w")]
    assert gsk.layout_of(held).names == ("w", "w.1")


def test_energies_are_squares_in_the_layout_s_shapes_and_make_a_plan():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="fc")])
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 4)), rng.standard_normal(4)
    energy = gsk.energies(model, tensors([kernel, bias]))
    found = gsk.layout_of(model)
    assert list(energy) == list(found.names)
    np.testing.assert_allclose(energy[found.names[0]], kernel.T**2, rtol=1e-6)
    optimizer = gsk.split("sgd", gs.lbf(found, energy, max_bins=6, min_gain=0.0), gs.Fixed(1.0))
    optimizer.build(model.trainable_variables)
    assert optimizer._bounding.plan.num_bins == 6


def test_layers_tell_the_kinds_of_their_variables():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Embedding(10, 8, name="token"),
            keras.layers.GRU(4, return_sequences=True, name="gru"),
            keras.layers.DepthwiseConv1D(3, depth_multiplier=2, name="depthwise_conv"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    optimizer = gsk.GSO(blocks={"*recurrent_kernel": 3})
    optimizer.build(model.trainable_variables)
    moving = optimizer._moving
    kinds = zip(moving.plan.layout.names, moving._rule.kinds, strict=True)
    found = {".".join(name.split(".")[-2:]): (kind.name, kind.direction, kind.blocks) for name, kind in kinds}
    assert found == {
        "token.embeddings": ("embedding", "adam", 1),
        "gru_cell.kernel": ("matrix", "orthogonal", 1),
        "gru_cell.recurrent_kernel": ("matrix", "orthogonal", 3),
        "gru_cell.bias": ("vector", "adam", 1),
        "depthwise_conv.kernel": ("matrix", "orthogonal", 4),
        "depthwise_conv.bias": ("vector", "adam", 1),
        "head.kernel": ("matrix", "orthogonal", 1),
        "head.bias": ("vector", "adam", 1),
    }


def test_a_pattern_that_matches_no_variable_is_refused_when_the_optimizer_is_built():
    with pytest.raises(ValueError, match="expected a pattern that matches a path, got one that matches none of 1"):
        gsk.GSO(kinds={"head.*": "matrix"}).build([keras.Variable(np.zeros((2, 2)), name="kernel")])
