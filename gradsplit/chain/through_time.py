"""The chain through the time steps of fused recurrent modules, measured on an unrolled copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsplit.chain.cells import Cell
from gradsplit.chain.chain import Recurrence
from gradsplit.chain.lyapunov import lyapunov_exponents
from gradsplit.chain.step_gains import squared_gains
from gradsplit.chain.unrolled import Unrolled


class Recurrences:
    """Listens to the recurrent modules of a model, and measures their chains afterwards.

    Args:
        modules: name -> module.
        num: Lyapunov exponents a layer.
    """

    def __init__(self, modules: dict[str, nn.RNNBase], num: int = 4) -> None:
        self.modules, self.num = modules, num
        self.calls: dict[str, tuple[Any, ...]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the arguments of each module's first call."""

        def keep(name: str) -> Any:
            return lambda module, args: self.calls.setdefault(name, args) and None

        handles = [module.register_forward_pre_hook(keep(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def measure(self, factors: list[Any]) -> list[Recurrence]:
        """Gains and exponents of every layer of every module whose outputs a signal reached.

        Args:
            factors: of `apply_factors`.
        """
        signals = {factor.cut.name: factor.signals for factor in factors}
        found = []
        for name, args in self.calls.items():
            module = self.modules[name]
            usable = isinstance(args[0], Tensor) and not getattr(module, "proj_size", 0)
            if name in signals and usable and not (module.dropout and module.num_layers > 1):
                found.extend(_chains(name, module, args, signals[name], self.num))
        return found


def recurrences_of(model: nn.Module) -> Recurrences | None:
    """A listener for the model's fused recurrent modules, None without any."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    return Recurrences(modules) if modules else None


def _chains(name: str, module: nn.RNNBase, args: Any, signals: list[Tensor], num: int) -> list[Recurrence]:
    unrolled = Unrolled(module)
    x = args[0].detach()
    start = args[1] if len(args) > 1 else None
    start = tuple(part.detach() for part in start) if isinstance(start, tuple) else start
    with torch.enable_grad(), unrolled.keep_signals():
        output, final = unrolled(x, start)
        ends = [output, *(final if isinstance(final, tuple) else (final,))]
        parameters = [p for p in module.parameters() if p.requires_grad]
        states = [state for layer in unrolled.states for state in layer[1:]]
        pairs = [(end, signal) for end, signal in zip(ends, signals, strict=False) if end.shape == signal.shape]
        if not pairs or not parameters:
            return []
        grads = torch.autograd.grad(
            [end for end, _ in pairs], states, [signal for _, signal in pairs], allow_unused=True
        )
    found = []
    flat = iter(grads)
    for number, layer in enumerate(unrolled.states):
        cell = unrolled.cells[number]
        assert isinstance(cell, Cell)
        here = [next(flat) for _ in layer[1:]]
        signal_T = torch.stack([torch.zeros_like(layer[0]) if g is None else g for g in here])
        state_T = torch.stack([state.detach() for state in layer[:-1]])
        input_T = torch.stack([entry.detach() for entry in unrolled.inputs[number]])
        before, after = squared_gains(cell, input_T, state_T, _lifted(signal_T))
        total = before.sum(1)
        gain_T = torch.where(total > 0, (after.sum(1) / total.clamp(min=1e-38)).sqrt(), torch.nan)
        label = name + (f" layer {number}" if len(unrolled.states) > 1 else "")
        exponents = _exponents(cell, input_T, state_T, num)
        # the first step's factor leads to the initial state, which is no variable: it counts as a step all
        # the same
        found.append(Recurrence(label, [float(g) for g in gain_T.flip(0)], exponents))
    return found


def _lifted(signal_T: Tensor) -> Tensor:
    # a gain does not depend on the scale of its signal; squares of signals below 1e-19 would vanish in
    # float32
    largest_T = signal_T.abs().amax(dim=(1, 2), keepdim=True)
    return torch.where(largest_T > 0, signal_T / largest_T.clamp(min=1e-38), signal_T)


def _exponents(cell: Cell, input_T: Tensor, state_T: Tensor, num: int) -> list[float]:
    weight = cell.weight_hh.detach()

    def step(time: int, state: Tensor) -> Tensor:
        with torch.no_grad():
            return cell.step(input_T[time, 0], state, weight, constant=True)

    return lyapunov_exponents(step, list(state_T[:, 0].unbind(0)), num)
