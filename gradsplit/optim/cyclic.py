"""Block after block, around any optimizer: one block of tensors is optimised at a time, and only it has a state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..amp import Scaling
from ..distributed import is_sharded, make_kernel
from ..hooks import attach_to
from ..plan import Layout, named_trainable, per_tensor

__all__ = ["ORDERS", "Cycle", "CyclicBlocks", "block_of"]

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


class Cycle:
    """Which block is active, and when the next one is.

    Every block is active once a cycle. From BAdam (Luo et al. 2024). Deviation: the order by energy.

    Args:
        names: the tensors.
        switch_every: steps a block stays active, >= 1.
        order: one of `ORDERS`.
        seed: of the random order.

    Raises:
        ValueError: an unknown order, a number of steps below 1, fewer than two blocks.

    >>> cycle = Cycle(["a.0.w", "a.1.w"], switch_every=2)
    >>> [cycle.begin_step(lambda: [1.0, 1.0]) and cycle.active for _ in range(5)]
    [0, 0, 1, 1, 0]
    """

    def __init__(self, names: Sequence[str], *, switch_every: int = 100, order: str = "fixed", seed: int = 0) -> None:
        if order not in ORDERS:
            raise ValueError(f"CyclicBlocks(order={order!r}): expected one of {', '.join(ORDERS)}.")
        if not isinstance(switch_every, int) or switch_every < 1:
            raise ValueError(
                f"CyclicBlocks(switch_every={switch_every!r}): expected a whole number of steps >= 1, for example 100."
            )
        self.blocks = list(dict.fromkeys(block_of(name) for name in names))
        if len(self.blocks) < 2:
            raise ValueError(
                f"CyclicBlocks(…): expected at least two blocks of tensors, got {self.blocks}. Blocks are the numbered "
                "modules, or the first part of the names. Use the optimizer alone."
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
                f"CyclicBlocks.load_state_dict(…): expected a cycle over {self.blocks}, got one over {state['blocks']}."
                " Make it with the model of the saved run."
            )
        self.active, self.steps_left = int(state["active"]), int(state["steps_left"])
        self.waiting = [int(block) for block in state["waiting"]]
        self._random.bit_generator.state = state["random"]


class CyclicBlocks:
    """Optimise one block of tensors after the other with any optimizer; only the active block has a state.

    Before each step of the optimizer, the gradients of all other blocks are hidden from it. When the next block becomes
    active, the state of the last one is dropped, which saves its memory. From BAdam (Luo et al. 2024), there around
    Adam. Deviation: the order by energy.

    Args:
        optimizer: any optimizer that passes over parameters without a gradient, as all of torch's do.
        model: a module, or pairs (name, parameter). What the optimizer does not hold is left out.
        switch_every: steps that a block stays active, >= 1.
        order: "fixed", "random", or "energy": of the blocks left, the one with the largest gradient is next.
        seed: of the random order.
        process_group: the ranks that hold shards of the parameters; None: all. All ranks choose the same block.

    Raises:
        ValueError: an unknown order, a number of steps below 1, fewer than two blocks, an optimizer that updates
            parameters during the backward pass.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> cyclic = CyclicBlocks(optimizer, model, switch_every=1)
    >>> before = [p.item() for p in model.parameters()]
    >>> for p in model.parameters():
    ...     p.grad = torch.ones(1, 1)
    >>> optimizer.step()
    >>> [round(p.item() - old, 4) for p, old in zip(model.parameters(), before)]
    [-1.0, 0.0]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        switch_every: int = 100,
        order: str = "fixed",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if getattr(optimizer, "updates_in_backward", False):
            raise ValueError(
                f"CyclicBlocks({type(optimizer).__name__}(in_backward=True), …): expected an optimizer that updates in "
                "step(), since the gradients of idle blocks would never be freed. Leave one of the two out."
            )
        given: Any = optimizer
        if not hasattr(given, "param_groups"):
            raise TypeError(
                f"CyclicBlocks({type(given).__name__}, …): expected a torch optimizer first, then the model. Write "
                "CyclicBlocks(optimizer, model)."
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        pairs = [(name, p) for name, p in named_trainable(model, call="CyclicBlocks") if id(p) in held]
        self.optimizer, self.process_group = optimizer, process_group
        self.parameters = [parameter for _, parameter in pairs]
        self.cycle = Cycle([name for name, _ in pairs], switch_every=switch_every, order=order, seed=seed)
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._handle = attach_to(optimizer, before=self._hide, after=self._show)

    def remove(self) -> None:
        """Let the optimizer update all blocks again."""
        self._handle.remove()

    def _hide(self) -> None:
        """Choose the block of this step, and hide the gradients of all others."""
        self._show()
        scaling = Scaling.of_step(self.optimizer)
        before = self.cycle.active
        if scaling is None or not bool(scaling.overflow()):  # turns are counted on the host
            self.cycle.begin_step(lambda: _energies(self.parameters, self.process_group))
        for t, parameter in enumerate(self.parameters):
            if self.cycle.is_active(t):
                continue
            if self.cycle.active != before:
                self.optimizer.state.pop(parameter, None)
            if parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def _show(self) -> None:
        while self._hidden:
            parameter, gradient = self._hidden.pop()
            parameter.grad = gradient

    def state_dict(self) -> dict[str, Any]:
        """Return whose turn it is; the optimizer's own state is saved beside it."""
        return self.cycle.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` left off.

        Raises:
            ValueError: the state of other blocks.
        """
        self.cycle.load(state)


def _energies(parameters: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[float]:
    """Each tensor's sum of squares of its gradient, over all ranks that hold shards."""
    if not any(is_sharded(parameter) for parameter in parameters):
        norms = [
            0.0 if p.grad is None else torch.linalg.vector_norm(p.grad.abs(), dtype=torch.float64) for p in parameters
        ]
        return [float(norm) ** 2 for norm in norms]
    layout = Layout.from_shapes({str(t): tuple(p.shape) for t, p in enumerate(parameters)})
    plan = per_tensor(layout)
    kernel = make_kernel(plan, parameters, group=group, call="CyclicBlocks")
    energy_T = np.zeros(len(layout))
    energy_T[plan.tensor_K] = kernel.squares([p.grad for p in parameters]).cpu().numpy()[plan.bin_K]
    return list(energy_T)
