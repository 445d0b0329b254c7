"""A character GPT in Keras on TensorFlow, trained by GSO without a clip and without warm-up.

    KERAS_BACKEND=tensorflow python examples/keras_text.py
    KERAS_BACKEND=tensorflow python examples/keras_text.py --control adam
    KERAS_BACKEND=tensorflow python examples/keras_text.py --control clip

The text is the Python language reference that every CPython carries, the model that of `gradsplit compare gpt`. The
number is the cross-entropy in nats a character on held-out text, less is better. Expected: `val_loss 2.058` with
``--control adam``, which is AdamW over bins at 1e-2, and `val_loss 2.289` with AdamW and a global clip; about two
minutes on 2 cores.
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
from keras import layers, ops

from gradsplit.integrations.keras import GSO, SplitCallback
from gradsplit.lab.workloads.text import load_corpus

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 3, 64, 4, 64, 16
HELD_OUT = 128


def gpt(vocabulary: int) -> keras.Model:
    """Learned positions, pre-norm blocks, no dropout, untied output."""
    normal = keras.initializers.RandomNormal(stddev=0.02)

    def dense(units, **options):
        return layers.Dense(units, kernel_initializer=normal.clone(), **options)

    ids = keras.Input((CONTEXT,), dtype="int32")
    token = layers.Embedding(vocabulary, WIDTH, embeddings_initializer=normal.clone(), name="token")
    position = layers.Embedding(CONTEXT, WIDTH, embeddings_initializer=normal.clone(), name="position")
    h = token(ids) + position(ops.arange(CONTEXT))
    for _ in range(LAYERS):
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, kernel_initializer=normal.clone())
        normed = layers.LayerNormalization(epsilon=1e-5)(h)
        h = h + attention(normed, normed, use_causal_mask=True)
        up = dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization(epsilon=1e-5)(h))
        h = h + dense(WIDTH)(up)
    return keras.Model(ids, dense(vocabulary, use_bias=False)(layers.LayerNormalization(epsilon=1e-5)(h)))


def windows(ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Characters and the characters that follow them, from the given positions."""
    cut = ids[starts[:, None] + np.arange(CONTEXT + 1)]
    return cut[:, :-1], cut[:, 1:]


def main() -> None:
    """Train, and print the loss on held-out text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--control", choices=["gso", "adam", "clip"], default="gso")
    options.add_argument("--lr", type=float, default=1e-2, help="for adam and clip")
    options.add_argument("--steps", type=int, default=500)
    chosen = options.parse_args()

    keras.utils.set_random_seed(0)
    corpus = load_corpus(None, CONTEXT)
    train, held_out = corpus.train.numpy(), corpus.validation.numpy()
    starts = np.random.default_rng(0).integers(0, len(train) - CONTEXT, chosen.steps * BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(chosen.lr, chosen.steps, alpha=0.01)
    if chosen.control == "gso":
        share = keras.optimizers.schedules.PolynomialDecay(0.03, chosen.steps, 0.0)
        optimizer, callbacks = GSO(share), [SplitCallback(verbose=1)]
    elif chosen.control == "adam":
        optimizer, callbacks = GSO(schedule, direction="adam", beta_2=0.99), [SplitCallback(verbose=1)]
    else:
        optimizer, callbacks = keras.optimizers.AdamW(schedule, beta_2=0.99, weight_decay=0.01, global_clipnorm=1.0), []
    model = gpt(len(corpus.vocabulary))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.fit(*windows(train, starts), batch_size=BATCH, shuffle=False, verbose=2, callbacks=callbacks)
    even = np.linspace(0, len(held_out) - CONTEXT - 1, HELD_OUT).astype(int)
    print(f"val_loss {model.evaluate(*windows(held_out, even), batch_size=32, verbose=0):.3f}")


if __name__ == "__main__":
    main()
