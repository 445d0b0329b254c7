"""What only the whole model can say of the share: how many layers stand in series, and whether vectors outweigh them.

Where the output is homogeneous in a layer's weights W, Euler's identity gives <dL/dW, W> = <dL/dy, y>, whichever layer
it is. So for every step, over the tensors t that are matrices or embeddings:

    e_t = <g_t, w_t>                      over rows whose gradient is finite
    h   = |sum_t e_t| / max_t |e_t|       37 for 36 plain convolutions and a head, 1 for one layer
    H   = max(h, 0.995 H)                 the series of late; H = 0 before the first step
    f   = min(1, (14 / H)^2)              a factor on the share of every tensor

Layers beside each other share the value of the whole, and do not count. A norm ends a series, since the values in front
of it add up to 0. A layer with a way around it counts with the part of the signal that it carries.

A step may change the loss, to first order, by at most gradient times step. Per tensor t, over its bins b:

    c_t = sum_b ||g_b|| tau_b max(||w_b||, least length)      tau_b the share of bin b
    M   = sum of c_t over matrices and embeddings
    V   = sum of min(c_t, M / 2) over vectors: biases and gains
    r   = min(1, min(1, 14 / H) M / V)                        a factor on the share of vectors

V > M where the values inside a net are far below 1: a bias moves by a fixed length, and would drown them. In a series
biases add up from layer to layer. One vector whose gradient explodes counts as M / 2 at most, so that it cannot stop
the others where H <= 14. Without matrices r = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["DEEP", "FADES", "Series", "in_full", "shortened"]

DEEP = 14.0
"""The number of layers in series beyond which the share is shortened."""

FADES = 0.995


def shortened(series: Tensor) -> Tensor:
    """Return the factor on the share, 0-d, for a number of layers in series.

    >>> shortened(torch.tensor([0.0, 6.0, 13.0, 28.0]))
    tensor([1.0000, 1.0000, 1.0000, 0.2500])
    """
    return (series.clamp(min=DEEP) / DEEP).pow(-2)


def in_full(array: Tensor) -> Tensor:
    """Return an array in at least float32, so that its products with another are."""
    return array.float() if array.dtype in (torch.float16, torch.bfloat16) else array


class Series:
    """The number of layers in series of late; parts of a model share one.

    Parts, and tensors inside backward, come one after the other. Each is shortened by what has come so far in this step
    and by the number of the steps before.

    Args:
        device: where the parameters are; None: on the CPU.

    Attributes:
        of_late: 0-d, the number H after the last step; 0 before the first.

    >>> series = Series()
    >>> factor = series.look(torch.full((28,), 3.0))
    >>> series.settle()
    >>> factor, series.of_late
    (tensor(0.2500, dtype=torch.float64), tensor(28., dtype=torch.float64))
    """

    def __init__(self, device: torch.device | None = None) -> None:
        narrow = device is not None and device.type == "mps"
        self.of_late = torch.zeros((), dtype=torch.float32 if narrow else torch.float64, device=device)
        self._sums: tuple[Tensor, Tensor] | None = None
        self._changes: tuple[Tensor, Tensor] | None = None
        self._next: Tensor | None = None
        self._factor: Tensor | None = None

    def look(self, euler_T: Tensor) -> Tensor:
        """Return the factor on the share, 0-d; nothing waits for the device.

        Args:
            euler_T: (T,) sums of gradient times weight, per tensor; 0 or not finite where they say nothing.
        """
        euler_T = euler_T.to(self.of_late).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        total, largest = euler_T.sum(), torch.linalg.vector_norm(euler_T, math.inf)
        if self._sums is not None:
            total, largest = total + self._sums[0], torch.maximum(largest, self._sums[1])
        self._sums = total, largest
        here = total.abs() / largest.clamp(min=1e-38)
        self._next = torch.where(largest > 0, torch.maximum(here, FADES * self.of_late), self.of_late)
        self._factor = shortened(self._next)
        return self._factor

    def balance(self, change_T: Tensor, vector_T: Tensor) -> Tensor:
        """Return the factor r on the share of vectors, 0-d, after `look`; nothing waits for the device.

        Args:
            change_T: (T,) c_t, >= 0, by which the step of each tensor may change the loss.
            vector_T: (T,) 1 for vectors, 0 for matrices and embeddings, of the dtype of `of_late`.

        >>> changes, vectors = torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]).double()
        >>> Series().balance(changes, vectors)                       # 3 / (1 + 1.5 + 1.5)
        tensor(0.7500, dtype=torch.float64)
        """
        change_T = change_T.to(self.of_late).nan_to_num(nan=0.0, posinf=0.0)
        matrices = change_T.dot(1 - vector_T)
        if self._changes is not None:
            matrices = matrices + self._changes[0]
        vectors = torch.minimum(change_T, matrices / 2).dot(vector_T)
        if self._changes is not None:
            vectors = vectors + self._changes[1]
        self._changes = matrices, vectors
        most = matrices if self._factor is None else matrices * self._factor.sqrt()
        return (most / vectors).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)

    def settle(self) -> None:
        """End a step."""
        if self._next is not None:
            self.of_late.copy_(self._next)  # in place, so that a captured step finds it again
        self.forget()

    def forget(self) -> None:
        """Leave the number as it was before this step."""
        self._sums = self._changes = self._next = self._factor = None
