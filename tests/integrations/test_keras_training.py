"""`model.fit` with a splitting optimizer: save, load and resume, mixed precision, and what the callback logs."""

from __future__ import annotations

import numpy as np
import pytest

import gradsplit as gs

keras = pytest.importorskip("keras")

from gradsplit.integrations import keras as gsk  # noqa: E402 - needs the line above

RNG = np.random.default_rng(0)
X = RNG.standard_normal((96, 6), dtype=np.float32)
Y = (X @ RNG.standard_normal((6, 3))).argmax(1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

OPTIMIZERS = {
    "SGD, RelativeStep": lambda: gsk.split(keras.optimizers.SGD(0.1, momentum=0.9)),
    "Adam, Ema": lambda: gsk.split("adam", budget=gs.Ema(1.05, beta=0.5, warmup=2)),
    "Adam, default": lambda: gsk.split(keras.optimizers.Adam(0.1)),
    "Adam, capped": lambda: gsk.split(keras.optimizers.Adam(0.1), cap_updates=True),
    "SGD, accumulated": lambda: gsk.split(keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)),
    "in LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(gsk.split(keras.optimizers.SGD(0.1))),
    "GSO": lambda: gsk.GSO(),
    "GSO, adam": lambda: gsk.GSO(0.03, direction="adam"),
    "GSO, bin": lambda: gsk.GSO(0.03, direction="adam", second_moment="bin"),
}


def compiled(optimizer, **options):
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(8, activation="tanh", name="hidden")
    model = keras.Sequential([keras.Input((6,)), hidden, keras.layers.Dense(3, name="head")])
    model.compile(optimizer, LOSS, jit_compile=False, **options)
    return model


def fit(model, epochs=1, **options):
    return model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, **options).history["loss"]


def weights_of(model):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_loaded_model_goes_on_bit_for_bit(make, tmp_path):
    model = compiled(make())
    first = fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert fit(loaded) == fit(model)
    assert np.isfinite(first).all()
    for ours, theirs in zip(weights_of(loaded), weights_of(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_state_of_before_without_the_number_of_layers_in_series_is_loaded():
    model = compiled(gsk.GSO())
    fit(model)
    saved: dict = {}
    model.optimizer.save_own_variables(saved)
    at = model.optimizer._moving.place_of_series(model.optimizer.variables)
    assert 0 < float(saved[str(at)]) < 14
    rest = [saved[str(i)] for i in range(len(saved)) if i != at]
    again = compiled(gsk.GSO())
    again.optimizer.build(again.trainable_variables)
    again.optimizer.load_own_variables({str(i): value for i, value in enumerate(rest)})
    for i, variable in enumerate(again.optimizer.variables):
        wanted = 0.0 if i == at else saved[str(i)]
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), wanted)


def test_a_run_that_forgets_its_history_ends_elsewhere(tmp_path):
    model = compiled(OPTIMIZERS["Adam, Ema"]())
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    history = loaded.optimizer._bounding._history
    history.write(keras.tree.map_structure(keras.ops.zeros_like, history.read()))
    assert fit(loaded) != fit(model)


def test_a_policy_of_half_precision_trains():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = compiled(gsk.split(keras.optimizers.SGD(0.1, momentum=0.9)))
        losses = fit(model, epochs=3)
    finally:
        keras.config.set_dtype_policy(before)
    assert losses[-1] < losses[0]
    assert {v.dtype for v in model.trainable_variables} == {"float32"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_variables_keep_their_dtype(dtype):
    held = [keras.Variable(np.zeros((2, 2)), dtype=dtype, name="kernel")]
    optimizer = gsk.split(keras.optimizers.SGD(1.0), budget=gs.Fixed(1.0))
    optimizer.apply([keras.ops.convert_to_tensor(np.array([[300.0, 0.5], [400.0, 0.0]]), dtype=dtype)], held)
    moved = np.array(keras.ops.convert_to_numpy(keras.ops.cast(held[0], "float32")))
    np.testing.assert_allclose(moved, [[-0.6, -0.5], [-0.8, 0.0]], atol=4e-3)
    assert keras.backend.standardize_dtype(held[0].dtype) == dtype


class Broken(keras.layers.Layer):
    """Multiplies the gradient of one unit by a huge number."""

    def call(self, x):
        ones = keras.ops.convert_to_tensor([[1.0, 1e6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
        return x * ones - keras.ops.stop_gradient(x * (ones - 1.0))


def exploding():
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(8, activation="tanh", name="hidden")
    model = keras.Sequential([keras.Input((6,)), hidden, Broken(), keras.layers.Dense(3, name="head")], name="net")
    model.compile(gsk.split(keras.optimizers.SGD(0.1), budget=gs.Fixed(0.5)), LOSS, jit_compile=False)
    return model


def test_the_callback_names_the_unit_that_explodes_and_counts_outcomes(capsys):
    model, callback = exploding(), gsk.SplitCallback(verbose=1, worst=2)
    logs = model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[callback]).history
    worst = callback.worst()
    assert [r.name.rpartition("hidden.")[2] for r in worst] == ["kernel[1:2]", "bias"]
    assert worst[0].norm > 1e3 and worst[0].norm_after == pytest.approx(0.5, rel=1e-5)
    assert len(logs["gradsplit_scaled"]) == 2
    assert logs["gradsplit_scaled"][0] >= 12  # two bins, six steps
    assert logs["gradsplit_zeroed"] == [0.0, 0.0]
    assert 0 < logs["gradsplit_kept"][1] < 0.01
    assert "hidden.kernel[1:2]" in capsys.readouterr().out


def test_the_callback_writes_scalars_and_names_for_tensorboard_every_so_many_batches(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = gsk.SplitCallback(tmp_path, every=2)
    exploding().fit(X, Y, batch_size=16, epochs=1, verbose=0, callbacks=[callback])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"gradsplit/{name}" for name in ("norm", "kept", "scaled", "zeroed")}
    assert [event.step for event in events.Scalars("gradsplit/norm")] == [2, 4, 6, 6]  # the last is the epoch's
    text = events.Tensors("gradsplit/worst/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("net.hidden.kernel[1:2]: ") or "hidden.kernel[1:2]: " in text


def test_the_callback_refuses_a_model_that_does_not_split():
    with pytest.raises(ValueError, match=r"SplitCallback: expected a model compiled with split\(…\) or GSO, got SGD"):
        fit(compiled(keras.optimizers.SGD(0.1)), callbacks=[gsk.SplitCallback()])


def test_the_callback_refuses_another_rhythm():
    with pytest.raises(ValueError, match=r"every=0\): expected 'epoch' or a number of batches >= 1"):
        gsk.SplitCallback(every=0)
