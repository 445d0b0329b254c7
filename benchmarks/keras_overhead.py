"""What splitting costs in Keras: a step with row bins beside the same optimizer with ``clipnorm``, paired in one run.

    make test-tensorflow ARGS=--collect-only  # makes .venv-tensorflow
    KERAS_BACKEND=tensorflow .venv-tensorflow/bin/python -m benchmarks.keras_overhead

Two times are taken, each of a compiled function, the two methods in turns: the whole training step of a model, and
the optimizer's step alone on gradients that lie ready. A pair is one round of each; the ratio is of a pair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import gradsplit as gs
from gradsplit.integrations.keras import GSO, split

RESULTS = Path(__file__).parent / "results" / "keras_overhead.json"


def perceptron() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Eight dense layers of 512 units, 2.1 M parameters; batch 128."""
    hidden = [keras.layers.Dense(512, activation="relu") for _ in range(8)]
    model = keras.Sequential([keras.Input((512,)), *hidden, keras.layers.Dense(10)])
    rng = np.random.default_rng(0)
    return model, rng.standard_normal((128, 512), dtype=np.float32), rng.integers(0, 10, 128)


def convolutions() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Six convolutions of 64 channels on 16 x 16 images, 0.2 M parameters; batch 32."""
    hidden = [keras.layers.Conv2D(64, 3, padding="same", activation="relu") for _ in range(6)]
    pool = keras.layers.GlobalAveragePooling2D()
    model = keras.Sequential([keras.Input((16, 16, 3)), *hidden, pool, keras.layers.Dense(10)])
    rng = np.random.default_rng(0)
    return model, rng.standard_normal((32, 16, 16, 3), dtype=np.float32), rng.integers(0, 10, 32)


class Block(keras.layers.Layer):
    """Attention and two dense layers, each behind a norm and beside what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.attention = keras.layers.MultiHeadAttention(4, width // 4)
        self.dense = keras.Sequential([keras.layers.Dense(4 * width, activation="gelu"), keras.layers.Dense(width)])

    def call(self, x):
        """Add attention, then the dense layers."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return x + self.dense(self.norms[1](x))


def text() -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """A transformer of two blocks, width 128, 0.46 M parameters; batch 32 of 64 tokens."""
    blocks = [Block(128) for _ in range(2)]
    model = keras.Sequential([keras.Input((64,), dtype="int32"), keras.layers.Embedding(256, 128), *blocks])
    model.add(keras.layers.Dense(256))
    rng = np.random.default_rng(0)
    return model, rng.integers(0, 256, (32, 64)).astype("int32"), rng.integers(0, 256, (32, 64))


MODELS = {"perceptron": perceptron, "convolutions": convolutions, "text": text}
METHODS = {
    "sgdm": {
        "clipnorm": lambda: keras.optimizers.SGD(0.01, momentum=0.9, clipnorm=1.0),
        "rows, Fixed": lambda: split(keras.optimizers.SGD(0.01, momentum=0.9), budget=gs.Fixed(0.1)),
        "rows, RelativeStep": lambda: split(keras.optimizers.SGD(0.01, momentum=0.9)),
    },
    "adamw": {
        "clipnorm": lambda: keras.optimizers.AdamW(0.001, clipnorm=1.0),
        "rows, Fixed": lambda: split(keras.optimizers.AdamW(0.001), budget=gs.Fixed(0.1)),
        "GSO": lambda: GSO(0.001, direction="adam"),
    },
    "gso": {
        "clipnorm": lambda: keras.optimizers.AdamW(0.001, clipnorm=1.0),
        "GSO, direction adam": lambda: GSO(0.001, direction="adam"),
        "GSO": lambda: GSO(),
    },
}


def steps_of(name: str, make, *, jit: bool):
    """Two compiled functions without arguments: the training step, and the optimizer's step alone."""
    keras.utils.set_random_seed(0)
    model, x, y = MODELS[name]()
    optimizer, loss_fn = make(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer.build(model.trainable_variables)
    inputs, targets = tf.constant(x), tf.constant(y)

    @tf.function(jit_compile=jit)
    def train():
        with tf.GradientTape() as tape:
            loss = loss_fn(targets, model(inputs, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_variables)
        return loss

    ready = [tf.random.stateless_normal(v.shape, (0, i)) * 0.01 for i, v in enumerate(model.trainable_variables)]

    @tf.function(jit_compile=jit)
    def update():
        optimizer.apply(ready, model.trainable_variables)
        return optimizer.iterations.value + 0

    return {"training step": train, "optimizer step": update}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(step, repeats: int, clock: str) -> float:
    """Seconds a call, over some calls in a row."""
    start = CLOCKS[clock]()
    for _ in range(repeats):
        out = step()
    np.asarray(out)
    return (CLOCKS[clock]() - start) / repeats


def measure(model: str, family: str, *, jit: bool, rounds: int, repeats: int, clock: str) -> list[dict]:
    """Rows of one model and optimizer: median milliseconds, and the ratio to clipnorm over the pairs."""
    steps = {method: steps_of(model, make, jit=jit) for method, make in METHODS[family].items()}
    rows = []
    for what in ("training step", "optimizer step"):
        times: dict[str, list[float]] = {method: [] for method in steps}
        for both in steps.values():
            seconds(both[what], 3, clock)  # traces and compiles
        for _ in range(rounds):
            for method, both in steps.items():
                times[method].append(seconds(both[what], repeats, clock))
        for method in steps:
            pairs = [a / b for a, b in zip(times[method], times["clipnorm"], strict=True)]
            low, _, high = statistics.quantiles(pairs, n=4)
            rows.append({
                "model": model, "optimizer": family, "method": method, "what": what, "jit_compile": jit,
                "ms": round(1e3 * statistics.median(times[method]), 4),
                "ratio": round(statistics.median(pairs), 3), "quartiles": [round(low, 3), round(high, 3)],
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--families", nargs="+", default=["sgdm", "adamw"], choices=METHODS)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: processor time, for a machine in use")
    parser.add_argument("--no-xla", action="store_true", help="leave out what is compiled by XLA")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    load = os.getloadavg()[0]
    rows = [
        row
        for model in options.models
        for family in options.families
        for jit in ((False,) if options.no_xla else (False, True))
        for row in measure(model, family, jit=jit, rounds=options.rounds, repeats=options.repeats, clock=options.clock)
    ]
    found = {
        "command": " ".join(["python -m benchmarks.keras_overhead", *sys.argv[1:]]), "clock": options.clock,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} thread",
        "load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1),
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__, "gradsplit": gs.__version__},
        "n": options.rounds, "repeats": options.repeats, "rows": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
