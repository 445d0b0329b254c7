"""The gradient as a sum, in JAX: pure functions over a dict of the terms' gradients, and over gradients per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import numpy as jnp

__all__ = ["SampleState", "TermState", "split_samples", "split_terms"]


class TermState(NamedTuple):
    """What the next call of `split_terms` depends on, and what the last one did.

    Attributes:
        maximum: term -> slowly decaying maximum of its norm.
        scale: term -> what its gradient was multiplied by, without its weight; 0 where it was left out.
        level: term -> its smoothed value; empty where no values are given.
        worst: term -> slowly decaying maximum of its value.
    """

    maximum: dict[str, Array]
    scale: dict[str, Array]
    level: dict[str, Array] = {}  # noqa: RUF012 - never written to
    worst: dict[str, Array] = {}  # noqa: RUF012


class SampleState(NamedTuple):
    """What the next call of `split_samples` depends on, and what the last one did.

    Attributes:
        scale: one running scale per leaf, a tree as the parameters.
        ratio: norm / limit per leaf, one number per sample, nan where it is not finite; a tree as the parameters.
    """

    scale: Any
    ratio: Any


def split_terms(
    gradients: Mapping[str, Any],
    state: TermState | None = None,
    *,
    values: Mapping[str, Array] | None = None,
    weights: Mapping[str, float] | None = None,
    decay: float = 0.999,
    growth: float = 1.05,
    relief: float = 10.0,
) -> tuple[Any, TermState]:
    """The sum of the terms' gradients, each bounded by the smallest of their slowly decaying maxima.

        m_k <- min(max(n_k, decay m_k), growth m_k),  m_k = n_k at first
        limit_k = (smallest m_j above 0) min(relief, max(1, sqrt(p_k / smallest p_j)))
        gradient = sum_k w_k g_k min(1, limit_k / n_k);   a term that is not finite is left out

    p_k is the smoothed value of the term over its slowly decaying maximum, see `gradsplit.TermSplitter`; without
    ``values`` every limit is the smallest m_j.

    It may be compiled; the first call, without a state, is another compilation. Terms that the state knows and that are
    not there in this call still count.

    Args:
        gradients: term -> its gradient, all trees of one structure, as `jax.grad` of each term gives them.
        state: from the call before.
        values: term -> its value, one number; pass it in every call or in none.
        weights: term -> w_k, 1 where not named.
        decay: what a maximum keeps per call.
        growth: largest ratio by which it rises per call.
        relief: largest factor by which the limit of a term that lags behind rises.

    Returns:
        The gradient for the optimizer, and the new state.

    Raises:
        ValueError: no term.

    >>> terms = {"data": {"w": jnp.array([1.0, 0.0])}, "penalty": {"w": jnp.array([0.0, 1e6])}}
    >>> total, state = split_terms(terms)
    >>> total["w"].tolist()
    [1.0, 1.0]

    Source: as `gradsplit.TermSplitter`; here all terms are taken to share their parameters.
    """
    if not gradients:
        raise ValueError("split_terms({}): expected at least one term, as in {'data': jax.grad(loss)(params)}.")
    norms = {name: _norm(jax.tree_util.tree_leaves(tree)) for name, tree in gradients.items()}
    maximum = {} if state is None else dict(state.maximum)
    for name, norm in norms.items():
        old = maximum.get(name, jnp.zeros_like(norm))
        moved = jnp.minimum(jnp.maximum(norm, decay * old), growth * old)
        maximum[name] = jnp.where(jnp.isfinite(norm) & (norm > 0), jnp.where(old > 0, moved, norm), old)
    known = jnp.stack(list(maximum.values()))
    limit = jnp.where(known > 0, known, jnp.inf).min()
    level, worst, left = _progress(state, values or {}, decay)
    least = jnp.stack([*(jnp.where(p > 0, p, jnp.inf) for p in left.values()), jnp.asarray(jnp.inf)]).min()
    limits = {
        name: limit * jnp.clip(jnp.sqrt(left[name] / least), 1.0, relief) if name in left else limit for name in norms
    }
    scale = {
        name: jnp.where(jnp.isfinite(norm), jnp.where(norm > limits[name], limits[name] / norm, 1.0), 0.0)
        for name, norm in norms.items()
    }
    total = None
    for name, tree in gradients.items():
        factor = scale[name] * (weights or {}).get(name, 1.0)
        sound = jnp.isfinite(norms[name])
        # The loops below run while JAX traces, so each part may hold this turn's numbers.
        part = jax.tree_util.tree_map(lambda g, f=factor, s=sound: jnp.where(s, _times(g, f), 0), tree)
        total = part if total is None else jax.tree_util.tree_map(jnp.add, total, part)
    return total, TermState(maximum, scale, level, worst)


def _progress(
    state: TermState | None, values: Mapping[str, Any], decay: float
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Every term's smoothed value, its largest value, and their ratio; the ratio is 0 where they are not above zero."""
    level = {} if state is None else dict(state.level)
    worst = {} if state is None else dict(state.worst)
    for name, given in values.items():
        value = jnp.asarray(given)
        value = value.astype(_wide(value))
        sound = jnp.isfinite(value)
        old, top = level.get(name, jnp.zeros_like(value)), worst.get(name, jnp.zeros_like(value))
        level[name] = jnp.where(sound, jnp.where(top > 0, 0.9 * old + 0.1 * value, value), old)
        worst[name] = jnp.where(sound, jnp.maximum(value, decay * top), top)
    fallen = {k: jnp.where((level[k] > 0) & (worst[k] > 0), level[k] / worst[k], 0.0) for k in level}
    return level, worst, fallen


def split_samples(
    gradients: Any,
    state: SampleState | None = None,
    *,
    quantile: float = 0.9,
    factor: float = 2.0,
    up: float = 0.1,
    down: float = 0.002,
    growth: float = 1.25,
) -> tuple[Any, SampleState]:
    """The mean gradient of a batch in which no sample poisons or drowns the others, from gradients per sample.

        g <- (1 / B) sum_i g_i min(1, limit / ||g_i||)  per leaf;   limit = factor m, m a running quantile of ||g_i||
        a sample whose gradient is not finite in any leaf is left out of all

    Args:
        gradients: a tree whose leaves have the samples in dimension 0:
            ``jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)``.
        state: from the call before.
        quantile: of the norms of the batch, in (0, 1]; the defaults are those of ``kind="classification"``, and
            (0.5, 3, 0.1, 0.1) are those of ``kind="regression"``.
        factor: limit / scale.
        up: share of the logarithmic distance by which the scale rises.
        down: the same where it falls.
        growth: largest ratio by which the scale rises.

    Returns:
        The gradient for the optimizer, and the new state, whose ``ratio`` names the samples.

    Raises:
        ValueError: leaves without one entry per sample, or an empty batch.

    >>> per_sample = {"w": jnp.array([[1.0], [jnp.nan], [3.0], [1.0]])}
    >>> mean, state = split_samples(per_sample, quantile=0.5, factor=1.0)
    >>> mean["w"].tolist()
    [0.75]

    Source: as `gradsplit.SampleSplitter`; here ||g_i|| is exact, and costs the memory of a gradient per sample.
    """
    leaves, structure = jax.tree_util.tree_flatten(gradients)
    if not leaves or any(leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(
            f"split_samples(…): expected leaves with one entry per sample in dimension 0, got the shapes {shapes}. Use "
            "jax.vmap(jax.grad(loss), in_axes=(None, 0))."
        )
    if not leaves[0].shape[0]:
        raise ValueError(
            "split_samples(…): expected at least one sample, got an empty batch, which has no mean. Leave the call out."
        )
    norms = [_norm_per_sample(leaf) for leaf in leaves]
    sound = jnp.stack([jnp.isfinite(norm) for norm in norms]).all(0)
    old = [jnp.zeros(())] * len(leaves) if state is None else jax.tree_util.tree_leaves(state.scale)
    scales, ratios, means = [], [], []
    for leaf, norm, before in zip(leaves, norms, old, strict=True):
        counts = sound & (norm > 0)
        ordered = jnp.sort(jnp.where(counts, norm, jnp.inf))
        place = jnp.maximum(jnp.ceil(counts.sum() * quantile).astype(int) - 1, 0)
        now = ordered[place]
        distance = jnp.log(now / before)
        move = jnp.where(distance > 0, jnp.minimum(up * distance, math.log(growth)), down * distance)
        scale = jnp.where(counts.any(), jnp.where(before > 0, before * jnp.exp(move), now), before)
        limit = jnp.where(scale > 0, factor * scale, jnp.inf)
        wide = (-1,) + (1,) * (leaf.ndim - 1)
        bounded = _times(leaf, jnp.minimum(limit / norm, 1.0).reshape(wide))
        means.append(jnp.where(sound.reshape(wide), jnp.where(norm.reshape(wide) > 0, bounded, leaf), 0).mean(0))
        scales.append(scale)
        ratios.append(jnp.where(sound, norm / limit, jnp.nan))
    back = jax.tree_util.tree_unflatten
    return back(structure, means), SampleState(back(structure, scales), back(structure, ratios))


def _norm(leaves: list[Any]) -> Array:
    """The L2 norm of all leaves; the largest entry is taken out first, so that no square overflows."""
    return _norm_per_sample(jnp.concatenate([leaf.reshape(-1).astype(_wide(leaf)) for leaf in leaves])[None])[0]


def _norm_per_sample(leaf: Any) -> Array:
    flat = jnp.abs(leaf.reshape(leaf.shape[0], -1).astype(_wide(leaf)))
    largest = flat.max(1, initial=0.0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return unit * jnp.sqrt(jnp.square(flat / unit[:, None]).sum(1))


def _times(array: Array, factor: Array) -> Array:
    """The product in the array's dtype; halves, which hold no tiny factor, are multiplied in float32."""
    wider = _wide(array)
    return (array.astype(wider) * factor.astype(wider)).astype(array.dtype)


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)
