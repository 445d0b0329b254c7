"""Block after block: only one block of tensors is optimised at a time, and only it has moments (BAdam)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import is_sharded, kernel_for
from ..kernels import make_kernel
from ..plan import Layout, per_tensor

__all__ = ["ORDERS", "Cyclic", "block_of"]

ORDERS = ("fixed", "random", "energy")
"""In the order of the model; shuffled anew in every cycle; the block with the largest gradient of those left first."""


def block_of(name: str) -> str:
    """Return the block of a tensor: its dotted name down to the first number, or its first part.

    >>> block_of("transformer.h.3.attn.weight"), block_of("head.weight")
    ('transformer.h.3', 'head')
    """
    parts = name.split(".")[:-1] or [name]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


class Cyclic:
    """Which block is active, and when the next one is.

    Every block is active once a cycle. From BAdam (Luo et al. 2024). Deviation: the order by energy.

    Args:
        names: the tensors.
        switch_every: steps a block stays active, >= 1.
        order: one of `ORDERS`.
        seed: of the random order.

    Raises:
        ValueError: an unknown order, a number of steps below 1, fewer than two blocks.

    >>> cyclic = Cyclic(["a.0.w", "a.1.w"], switch_every=2)
    >>> [cyclic.begin_step(lambda: [1.0, 1.0]) and cyclic.active for _ in range(5)]
    [0, 0, 1, 1, 0]
    """

    def __init__(self, names: Sequence[str], *, switch_every: int = 100, order: str = "fixed", seed: int = 0) -> None:
        if order not in ORDERS:
            raise ValueError(f"GSO(order={order!r}): expected one of {', '.join(ORDERS)}.")
        if not isinstance(switch_every, int) or switch_every < 1:
            raise ValueError(f"GSO(switch_every={switch_every!r}): expected at least one step.")
        self.blocks = list(dict.fromkeys(block_of(name) for name in names))
        if len(self.blocks) < 2:
            raise ValueError(
                f"GSO(schedule='cyclic'): expected at least two blocks of tensors, got {self.blocks}. Blocks are the "
                "numbered modules, or the first part of the names; use schedule='all'."
            )
        index = {block: i for i, block in enumerate(self.blocks)}
        self.block_T = np.array([index[block_of(name)] for name in names], dtype=np.int64)
        self.switch_every, self.order = switch_every, order
        self._random = np.random.default_rng(seed)
        self.active = -1
        self.steps_left = 0
        self.waiting: list[int] = []

    def begin_step(self, energies: Callable[[], Sequence[float]]) -> bool:
        """Enter a step; return True. The next block becomes active when the last one's steps are used up.

        Args:
            energies: each tensor's sum of squares now; called only where the order is by energy and a switch is due.
        """
        if self.steps_left == 0:
            if not self.waiting:
                self.waiting = list(range(len(self.blocks)))
                if self.order == "random":
                    self.waiting = [int(i) for i in self._random.permutation(len(self.blocks))]
            if self.order == "energy":
                energy = np.bincount(self.block_T, weights=np.nan_to_num(np.asarray(energies(), dtype=np.float64)))
                self.waiting.sort(key=lambda block: (-energy[block], block))
            self.active = self.waiting.pop(0)
            self.steps_left = self.switch_every
        self.steps_left -= 1
        return True

    def begin(self, parameters: Sequence[Tensor], group: Any = None) -> list[Tensor]:
        """Enter a step; return the parameters of the blocks that have just become idle, which lose their moments.

        Args:
            parameters: the optimizer's, in the order of the names.
            group: the ranks that hold shards of them; all ranks choose the same block.
        """
        before = self.active
        self.begin_step(lambda: _energies(parameters, group))
        return [] if self.active == before else [p for t, p in enumerate(parameters) if not self.is_active(t)]

    def is_active(self, t: int) -> bool:
        """Whether tensor t is optimised in this step."""
        return bool(self.block_T[t] == self.active)

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {
            "blocks": list(self.blocks),
            "active": self.active,
            "steps_left": self.steps_left,
            "waiting": list(self.waiting),
            "random": self._random.bit_generator.state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` left off.

        Raises:
            ValueError: the state of other blocks.
        """
        if state["blocks"] != self.blocks:
            raise ValueError(
                f"GSO.load_state_dict(…): expected a cycle over {self.blocks}, got one over {state['blocks']}. Make "
                "GSO with the model of the saved run."
            )
        self.active, self.steps_left = int(state["active"]), int(state["steps_left"])
        self.waiting = [int(block) for block in state["waiting"]]
        self._random.bit_generator.state = state["random"]


def _energies(parameters: Sequence[Tensor], group: Any) -> list[float]:
    """Each tensor's sum of squares of its gradient, over all ranks that hold shards."""
    if not any(is_sharded(parameter) for parameter in parameters):
        norms = [
            0.0 if p.grad is None else torch.linalg.vector_norm(p.grad.abs(), dtype=torch.float64) for p in parameters
        ]
        return [float(norm) ** 2 for norm in norms]
    layout = Layout.from_shapes({str(t): tuple(p.shape) for t, p in enumerate(parameters)})
    plan, device = per_tensor(layout), parameters[0].device
    kernel = kernel_for(plan, parameters, lambda local: make_kernel("auto", local, device, call="GSO"), group=group)
    energy_T = np.zeros(len(layout))
    energy_T[plan.tensor_K] = kernel.squares([p.grad for p in parameters]).cpu().numpy()[plan.bin_K]
    return list(energy_T)
