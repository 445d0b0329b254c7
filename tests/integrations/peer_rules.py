"""Other people's rules written out from their publications and sources, in float64: what migration is compared with.

A rule of gradients is ``rule(names, weights, gradients) -> gradients``, arrays in torch's layout; state, where it has
some, lives in an object. The sources are named at each.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def _norm(arrays):
    return math.sqrt(sum(float((array**2).sum()) for array in arrays))


def global_clip(limit):
    """optax `clip_by_global_norm`, Keras `global_clipnorm`: g if ||g|| < limit, else g limit / ||g||."""

    def rule(names, weights, gradients):
        norm = _norm(gradients)
        return [g if norm < limit else g / norm * limit for g in gradients]

    return rule


def clip_each(limit):
    """Keras `clipnorm`: every variable by itself, g limit / max(||g||, limit)."""
    return lambda names, weights, gradients: [g * limit / max(_norm([g]), limit) for g in gradients]


def _bounded_units(weight, gradient, axes, factor, eps):
    w = np.sqrt((weight**2).sum(axes, keepdims=True))
    n = np.sqrt((gradient**2).sum(axes, keepdims=True))
    largest = factor * np.maximum(w, eps)
    return np.where(n < largest, gradient, gradient * largest / np.maximum(n, 1e-6))


def agc_of_rows(factor, eps=1e-3, leave_out=0):
    """Brock et al. 2021 as in timm: all axes but the first; a vector is one unit; the last tensors may be left out."""

    def rule(names, weights, gradients):
        count = len(gradients) - leave_out
        units = [tuple(range(1, g.ndim)) or None for g in gradients]
        both = list(zip(weights, gradients, units, strict=True))
        return [_bounded_units(w, g, axes, factor, eps) for w, g, axes in both[:count]] + gradients[count:]

    return rule


def agc_of_kernels(factor, eps=1e-3):
    """The same as in optax, on its own layouts: (in, out) over axis 0, HWIO over axes 0 to 2."""

    def rule(names, weights, gradients):
        bounded = []
        for w, g in zip(weights, gradients, strict=True):
            if g.ndim < 2:
                bounded.append(_bounded_units(w, g, None, factor, eps))
                continue
            to_last = (*range(2, g.ndim), 1, 0)
            back = np.argsort(to_last)
            there = _bounded_units(w.transpose(to_last), g.transpose(to_last), tuple(range(g.ndim - 1)), factor, eps)
            bounded.append(there.transpose(back))
        return bounded

    return rule


class ZClip:
    """arXiv 2504.02507, option "adaptive_scaling"; in its own order: statistic first, then the fixed limit."""

    def __init__(self, alpha=0.97, z_thresh=2.5, max_grad_norm=None, warmup=25):
        self.alpha, self.z, self.largest, self.warmup = alpha, z_thresh, max_grad_norm, warmup
        self.seen: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, names, weights, gradients):
        norm = _norm(gradients)
        limit = norm
        if len(self.seen) < self.warmup:
            self.seen.append(norm)
            self.mean, self.variance = float(np.mean(self.seen)), float(np.var(self.seen))
        else:
            sigma = math.sqrt(self.variance)
            score = (norm - self.mean) / (sigma + 1e-6)
            if score > self.z:
                limit = self.mean + self.z**2 / score * sigma
            self.mean = self.alpha * self.mean + (1 - self.alpha) * limit
            self.variance = self.alpha * self.variance + (1 - self.alpha) * (limit - self.mean) ** 2
        if self.largest is not None:
            limit = min(limit, self.largest)
        return [g * limit / (norm + 1e-6) if norm > limit else g for g in gradients]


class AutoClip:
    """arXiv 2007.14469: the global norm is held to a percentile of all norms so far, this one included."""

    def __init__(self, percentile=10):
        self.percentile, self.norms = percentile, []

    def __call__(self, names, weights, gradients):
        norm = _norm(gradients)
        self.norms.append(norm)
        limit = float(np.percentile(self.norms, self.percentile))
        return [g * min(1.0, limit / norm) for g in gradients]


class AdamMini:
    """arXiv 2406.16793, its blocks for linear layers: one second moment a row of a matrix, one an entry of a bias."""

    def __init__(self, model, lr, betas=(0.9, 0.999), eps=1e-8):
        self.model, self.lr, self.betas, self.eps, self.state, self.count = model, lr, betas, eps, {}, 0

    def step(self):
        b1, b2 = self.betas
        self.count += 1
        for name, p in self.model.named_parameters():
            g = p.grad.double().numpy()
            square = (g**2).mean(axis=1, keepdims=True) if g.ndim > 1 else g**2
            m, v = self.state.get(name, (np.zeros_like(g), np.zeros_like(square)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * square
            self.state[name] = m, v
            update = m / (1 - b1**self.count) / (np.sqrt(v / (1 - b2**self.count)) + self.eps)
            p.data -= torch.from_numpy(self.lr * update).to(p.dtype)


class BAdam:
    """arXiv 2404.02827 in ascending order: AdamW made anew for each block, K steps long; the others stand still."""

    def __init__(self, model, lr, switch_every):
        self.blocks, self.lr, self.every, self.count = list(model.children()), lr, switch_every, 0
        self.blocks = [block for block in self.blocks if list(block.parameters())]

    def step(self):
        if self.count % self.every == 0:
            block = self.blocks[self.count // self.every % len(self.blocks)]
            self.optimizer = torch.optim.AdamW(block.parameters(), lr=self.lr)
        self.count += 1
        self.optimizer.step()
