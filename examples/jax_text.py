"""A character GPT in JAX on the Python language reference, optimised by optax with the rows of its gradient bounded.

    python examples/jax_text.py                     gso: prints 1.310 after 600 steps, 25 s of processor time
    python examples/jax_text.py --optimizer split   SGD with momentum behind split_gradients
    python examples/jax_text.py --optimizer adamw   AdamW behind a global clip, for comparison

The text, the windows and the validation loss are those of the PyTorch workload "gpt"; the model is written in plain
JAX, so that parameters are a dictionary of arrays and nothing but jax and optax is needed.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from gradsplit.integrations.optax import SplitTransformation, gso, split_gradients
from gradsplit.lab.workloads.text import TextTask, build_gpt

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 2, 64, 4, 64, 16


def init(seed: int, vocabulary: int) -> dict[str, Any]:
    """Parameters; kernels are (in, out), embeddings (token, width)."""
    keys = iter(jax.random.split(jax.random.key(seed), 8 * LAYERS + 3))

    def normal(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    def dense(inputs: int, outputs: int) -> dict[str, jax.Array]:
        return {"kernel": normal(inputs, outputs), "bias": jnp.zeros(outputs)}

    def block() -> dict[str, Any]:
        return {
            "norm1": norm(),
            "qkv": dense(WIDTH, 3 * WIDTH),
            "out": dense(WIDTH, WIDTH),
            "norm2": norm(),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH),
        }

    return {
        "token": {"embedding": normal(vocabulary, WIDTH)},
        "position": {"embedding": normal(CONTEXT, WIDTH)},
        "blocks": [block() for _ in range(LAYERS)],
        "norm": norm(),
        "head": {"kernel": normal(WIDTH, vocabulary)},
    }


def logits(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Logits (batch, time, vocabulary) of the next character."""
    h = params["token"]["embedding"][x] + params["position"]["embedding"]
    for block in params["blocks"]:
        qkv = _dense(block["qkv"], _norm(block["norm1"], h))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape, 3, HEADS, WIDTH // HEADS), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape)
        h = h + _dense(block["out"], mixed)
        h = h + _dense(block["down"], jax.nn.gelu(_dense(block["up"], _norm(block["norm2"], h))))
    return _norm(params["norm"], h) @ params["head"]["kernel"]


def loss(params: dict[str, Any], ids: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per character, of windows (batch, context + 1)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, ids[:, :-1]), ids[:, 1:]).mean()


def optimizer_named(name: str, steps: int) -> tuple[optax.GradientTransformation, SplitTransformation | None]:
    """The optimizer, and the part of it that can say what it did."""
    if name == "gso":
        ours = gso(optax.linear_schedule(0.03, 0.0, steps))
        return ours, ours
    if name == "split":
        rate = optax.cosine_decay_schedule(0.1, steps, 0.01)
        ours = split_gradients(learning_rate=rate, momentum=0.9)
        return optax.chain(ours, optax.sgd(rate, momentum=0.9)), ours
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, steps // 10, steps, 1e-4)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01)), None


def train(name: str, steps: int, seed: int) -> float:
    """Train and return the validation loss; the whole run is one compilation of one step."""
    task: TextTask = build_gpt(seed, context=CONTEXT, batch=BATCH)
    optimizer, ours = optimizer_named(name, steps)
    params = init(seed, len(task.corpus.vocabulary))
    state = jax.jit(optimizer.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, ids)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    for i in range(steps):
        x, y = task.batch(i)
        ids = np.concatenate([x.numpy(), y.numpy()[:, -1:]], axis=1)
        params, state, value = step(params, state, jnp.asarray(ids))
        if i % 100 == 0:
            worst = "" if ours is None else f"   {ours.record(state, params)}"
            print(f"step {i:4d}   training loss {float(value):.3f}{worst}")
    return _validation_loss(params, task)


def _validation_loss(params: Any, task: TextTask) -> float:
    held_out = task.corpus.validation.numpy()
    count = min(128, len(held_out) // (CONTEXT + 1))
    starts = np.linspace(0, len(held_out) - CONTEXT - 1, count).astype(int)[:, None]
    parts = np.split(held_out[starts + np.arange(CONTEXT + 1)], range(32, count, 32))
    one = jax.jit(loss)
    return sum(float(one(params, jnp.asarray(part))) * len(part) for part in parts) / count


def _dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _norm(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * layer["scale"] + layer["bias"]


def main() -> None:
    """Train, and print the validation loss."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--optimizer", choices=("gso", "split", "adamw"), default="gso")
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    result = train(asked.optimizer, asked.steps, asked.seed)
    print(f"{asked.optimizer}: validation loss {result:.3f} nats per character after {asked.steps} steps")


if __name__ == "__main__":
    main()
