"""Run by test_optax_sharded.py in a process of its own, on a mesh of four virtual devices; prints one JSON line."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gradsplit as gs
from gradsplit.integrations.optax import gso, split_gradients

KERNEL, BIAS = (8, 12), (12,)


def data(seed):
    rng = np.random.default_rng(seed)
    return {"kernel": np.float32(rng.standard_normal(KERNEL)), "bias": np.float32(rng.standard_normal(BIAS))}


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def run(optimizer, params, place):
    """Three steps of a compiled update on placed arrays; the gradients grow, one of them explodes."""
    params = place(params)
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(optimizer.update)
    for i in range(3):
        given = {k: v * np.float32(10.0**i) for k, v in data(i).items()}
        given["kernel"][1, 3] *= np.float32((1e20, 1, 1e4)[i])
        updates, state = step(place(given), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def main():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    columns = {"kernel": PartitionSpec("data", None), "bias": PartitionSpec()}  # every row spread over all devices
    rows = {"kernel": PartitionSpec(None, "data"), "bias": PartitionSpec("data")}
    made = {
        "relative": lambda: split_gradients("xsp", gs.Relative(0.02)),
        "tree": lambda: split_gradients("tree_sp", {"root": gs.Ema(1.1, warmup=1), "bin": gs.Fixed(2.0)}),
        "gso": lambda: gso(0.1, direction="adam"),
        "share": lambda: gso(0.1),
        "gso bin": lambda: gso(0.1, direction="adam", second_moment="bin"),
    }
    found = {"devices": len(jax.devices())}
    for name, make in made.items():
        alone, _ = run(make(), data(7), lambda tree: jax.tree.map(jnp.asarray, tree))
        for how, specs in (("rows", rows), ("columns", columns)):
            if name == "gso bin" and how == "columns":
                continue

            def place(tree, specs=specs):
                return {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()}

            sharded, state = run(make(), data(7), place)
            found[f"{name}, {how}"] = distance(alone, sharded)
        if name == "share":
            found["moments stay spread"] = len({str(s.index) for s in state.mu["kernel"].addressable_shards}) == 4
    found["shard_map, replicated"] = in_shard_map(mesh, PartitionSpec())
    found["shard_map, rows"] = in_shard_map(mesh, PartitionSpec(None, "data"))
    print(json.dumps(found))


def in_shard_map(mesh, spec):
    """Data parallel by hand: each device's part of the gradient is averaged, the update runs on what it holds."""
    params, parts = {"kernel": data(7)["kernel"]}, np.stack([data(i)["kernel"] for i in range(4)])
    parts[2, 1, 3] = 1e6
    optimizer = optax.chain(split_gradients("xsp", gs.Relative(0.02)), gso(0.1, direction="adam"))
    expected, _ = optimizer.update({"kernel": jnp.asarray(parts.mean(0))}, optimizer.init(params), params)
    replicated = spec == PartitionSpec()

    def step(params, part):
        given = jax.lax.pmean(part[0], "data") if replicated else part.mean(0)
        updates, _ = optimizer.update({"kernel": given}, optimizer.init(params), params)
        return updates

    part_spec = PartitionSpec("data") if replicated else PartitionSpec(None, *spec)
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=({"kernel": spec}, part_spec), out_specs={"kernel": spec}))
    return distance(mapped({"kernel": jnp.asarray(params["kernel"])}, jnp.asarray(parts)), expected)


if __name__ == "__main__":
    main()
