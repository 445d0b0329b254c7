"""Splitting in Keras on TensorFlow: eager, as a graph and compiled by XLA alike, traced once, no calls to the host."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import gradsplit as gs
from tests.architecture.sources import ROOT

tf = pytest.importorskip("tensorflow")
import keras  # noqa: E402

if keras.backend.backend() != "tensorflow":
    pytest.skip("needs KERAS_BACKEND=tensorflow; `make test-tensorflow` sets it", allow_module_level=True)

from gradsplit.integrations import keras as gsk  # noqa: E402

RNG = np.random.default_rng(0)
X = tf.constant(RNG.standard_normal((16, 6), dtype=np.float32))
Y = tf.constant(RNG.integers(0, 3, 16))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
STEPS = 8

OPTIMIZERS = {
    "RelativeStep": lambda: gsk.split(keras.optimizers.SGD(0.1, momentum=0.9)),
    "every level": lambda: gsk.split(
        "adam",
        lambda layout: gs.tree_sp(layout, inner="xsp"),
        {"root": gs.Percentile(0.5), "module": gs.Relative(0.05), "bin": gs.Ema(1.05, beta=0.5, warmup=2)},
        rule="nearest",
    ),
    "accumulated": lambda: gsk.split(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    "default before Adam": lambda: gsk.split("adam"),
    "capped": lambda: gsk.split(keras.optimizers.Adam(0.1), cap_updates=True),
    "GSO": lambda: gsk.GSO(keras.optimizers.schedules.CosineDecay(0.03, STEPS)),
}


def step_of(make):
    """A model, its optimizer and one training step as a Python function."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)])
    optimizer = make()
    optimizer.build(model.trainable_variables)
    traces = []

    def step(scale):
        traces.append(1)
        with tf.GradientTape() as tape:
            loss = scale * LOSS(Y, model(X))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_weights), model.trainable_weights, strict=True)
        )
        return loss

    return model, step, traces


def run(make, wrap):
    model, step, traces = step_of(make)
    wrapped = wrap(step)
    for i in range(STEPS):
        wrapped(tf.constant(1e4 if i == 3 else 1.0))
    return [v.numpy() for v in model.trainable_variables], len(traces)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_graph_and_xla_do_what_eager_does_and_are_traced_once(make):
    eager, _ = run(make, lambda step: step)
    # XLA compiles the projection of a tree for most of a minute; test_xp.py has it once.
    for jit in (False, True) if make is not OPTIMIZERS["every level"] else (False,):
        compiled, traces = run(make, lambda step, jit=jit: tf.function(step, jit_compile=jit))
        # A function may be traced a second time where the first made variables; here all are made before.
        assert traces == 1
        for ours, theirs in zip(compiled, eager, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


class Counted(keras.Model):
    """Counts how often its training step is traced."""

    def __init__(self, optimizer):
        super().__init__()
        self.fc, self.traces = keras.layers.Dense(3), 0
        self.compile(optimizer, LOSS, jit_compile=True)

    def call(self, x):
        return self.fc(x)

    def train_step(self, data):
        self.traces += 1
        return super().train_step(data)


def test_a_whole_run_of_fit_is_traced_as_often_as_without_splitting():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
    plain, ours = (keras.optimizers.SGD(schedule, momentum=0.9) for _ in range(2))
    counts = []
    for model in (Counted(plain), Counted(gsk.split(ours))):
        model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
        first = model.traces
        model.fit(X, Y, batch_size=8, epochs=3, verbose=0)
        assert model.traces == first, "traced anew after the first epoch"
        counts.append(first)
    assert counts[0] == counts[1]


def operations(step):
    graph = tf.function(step).get_concrete_function(tf.constant(1.0)).graph
    inner = [f.definition.node_def for f in graph._functions.values()] if hasattr(graph, "_functions") else []
    return {op.type for op in graph.get_operations()} | {node.op for nodes in inner for node in nodes}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_graph_calls_nothing_on_the_host(make):
    found = operations(step_of(make)[1])
    assert "ReadVariableOp" in found
    assert not {name for name in found if "PyFunc" in name or "HostCall" in name}


def test_a_call_to_the_host_would_be_found():
    step = step_of(OPTIMIZERS["GSO"])[1]
    assert "EagerPyFunc" in operations(lambda scale: step(tf.py_function(lambda x: x, [scale], tf.float32)))


@pytest.mark.parametrize(
    "make", [OPTIMIZERS["GSO"], lambda: gsk.split("sgd", budget=gs.Fixed(0.01))], ids=["GSO", "split"]
)
def test_slices_of_an_embedding_s_gradient_are_taken_as_the_whole(make):
    def run(dense):
        keras.utils.set_random_seed(0)
        layer, optimizer = keras.layers.Embedding(7, 3), make()
        layer.build()
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(tf.constant([[1, 4, 1], [5, 1, 4]])) ** 2)
            (gradient,) = tape.gradient(loss, layer.trainable_variables)
            assert isinstance(gradient, tf.IndexedSlices)
            optimizer.apply([tf.convert_to_tensor(gradient) if dense else gradient], layer.trainable_variables)
        return layer.embeddings.numpy(), optimizer.split_report.counts()

    (ours, counts), (theirs, _) = run(False), run(True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert (counts[0][[1, 4, 5]] == 3).all() or make is OPTIMIZERS["GSO"]
    assert (counts[0][[0, 2, 3, 6]] == 0).all(), "rows that were not looked up have no gradient"


_TWO_REPLICAS = """
import keras, numpy as np, tensorflow as tf
from gradsplit.integrations import keras as gsk
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
for optimizer in (gsk.GSO, lambda: gsk.split("sgd")):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        model.compile(optimizer(), "mse", jit_compile=False)
    try:
        model.fit(np.zeros((8, 6)), np.zeros((8, 3)), batch_size=8, verbose=0)
    except ValueError as error:
        print(error)
"""


def test_several_replicas_are_refused():
    done = subprocess.run([sys.executable, "-c", _TWO_REPLICAS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for call in ("GSO(…)", "split(…)"):
        assert f"{call}: expected one replica, got a strategy of 2" in done.stdout, done.stdout
