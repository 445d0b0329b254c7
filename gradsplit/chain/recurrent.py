"""One time step of torch's recurrent modules, written out: state in, state out.

A state is one tensor (batch, S): the hidden vector, and for an LSTM the hidden vector followed by the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .chain import Recurrence


class Cell(nn.Module):
    """One layer and direction of an `nn.RNN`, `nn.GRU` or `nn.LSTM`, one step at a time.

    The parameters are the very tensors of the fused module, so that training one trains the other.

    Args:
        source: the fused module.
        layer: its layer.
        reverse: the backward direction of a bidirectional module.

    Raises:
        ValueError: the module projects its output (`proj_size`), which has no cell here.

    >>> fused = nn.GRU(2, 3)
    >>> x = torch.ones(1, 1, 2)
    >>> torch.allclose(Cell(fused, 0)(x[0], torch.zeros(1, 3)), fused(x)[1][0])
    True
    """

    def __init__(self, source: nn.RNNBase, layer: int = 0, reverse: bool = False) -> None:
        super().__init__()
        if getattr(source, "proj_size", 0):
            raise ValueError(
                f"Cell({type(source).__name__}(proj_size={source.proj_size})): expected proj_size=0. "
                "Put an nn.Linear behind the recurrence instead."
            )
        end = f"_l{layer}{'_reverse' if reverse else ''}"
        self.mode, self.hidden_size = source.mode, source.hidden_size
        self.weight_ih: nn.Parameter = getattr(source, f"weight_ih{end}")
        self.weight_hh: nn.Parameter = getattr(source, f"weight_hh{end}")
        self.bias_ih: nn.Parameter | None = getattr(source, f"bias_ih{end}", None)
        self.bias_hh: nn.Parameter | None = getattr(source, f"bias_hh{end}", None)

    @property
    def state_size(self) -> int:
        """Length of the state vector: hidden size, twice that for an LSTM."""
        return 2 * self.hidden_size if self.mode == "LSTM" else self.hidden_size

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """The next state (batch, S) from the input (batch, I) and the state (batch, S)."""
        return self.step(x, state, self.weight_hh)

    def step(self, x: Tensor, state: Tensor, weight_hh: Tensor, constant: bool = False) -> Tensor:
        """The same with a recurrent weight of the caller's.

        With `constant`, whatever differentiates the step's Jacobian meets the weight as the factor that acts on
        the state alone: other parameters, and the slopes of the activations, are constants.
        """
        w_ih, b_ih, b_hh = self.weight_ih, self.bias_ih, self.bias_hh
        if constant:
            w_ih = w_ih.detach()  # type: ignore[assignment]
            b_ih = None if b_ih is None else b_ih.detach()  # type: ignore[assignment]
            b_hh = None if b_hh is None else b_hh.detach()  # type: ignore[assignment]
        hidden, memory = state[..., : self.hidden_size], state[..., self.hidden_size :]
        from_input = functional.linear(x, w_ih, b_ih)
        if constant:  # the second term is zero, and so is its derivative by the weight; that by the state is the weight
            from_state = functional.linear(hidden.detach(), weight_hh.detach(), b_hh)
            from_state = from_state + functional.linear(hidden - hidden.detach(), weight_hh)
        else:
            from_state = functional.linear(hidden, weight_hh, b_hh)
        if self.mode == "RNN_TANH":
            return torch.tanh(from_input + from_state)
        if self.mode == "RNN_RELU":
            return torch.relu(from_input + from_state)
        if self.mode == "GRU":
            reset_x, update_x, new_x = from_input.chunk(3, -1)
            reset_h, update_h, new_h = from_state.chunk(3, -1)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            return new + update * (hidden - new)
        gate_i, gate_f, gate_g, gate_o = (from_input + from_state).chunk(4, -1)
        memory = torch.sigmoid(gate_f) * memory + torch.sigmoid(gate_i) * torch.tanh(gate_g)
        return torch.cat([torch.sigmoid(gate_o) * torch.tanh(memory), memory], -1)


class Unrolled(nn.Module):
    """The same function as a fused `nn.RNN`, `nn.GRU` or `nn.LSTM`, with a joint at every time step.

    A fused module computes all steps in one operation: nothing between them can be measured or bounded.
    This one calls a `Cell` at every step; it shares the fused module's parameters and costs about five
    times its time.

    Args:
        source: the fused module; dropout between layers is not supported.

    Raises:
        ValueError: `proj_size`, or dropout between layers.

    Attributes:
        states: after a call, for each layer and direction the list of its states (batch, S), the initial
            one first, in the order in which the steps were taken; they belong to the graph, so
            `retain_grad` works on them.
        inputs: likewise the inputs (batch, I) of every step.

    >>> fused = nn.LSTM(2, 3, batch_first=True)
    >>> x = torch.ones(1, 4, 2)
    >>> torch.allclose(Unrolled(fused)(x)[0], fused(x)[0], atol=1e-6)
    True
    """

    def __init__(self, source: nn.RNNBase) -> None:
        super().__init__()
        if source.dropout and source.num_layers > 1:
            raise ValueError(
                f"Unrolled({type(source).__name__}(dropout={source.dropout})): expected dropout=0 between layers. "
                "Unroll one layer at a time, with nn.Dropout between them."
            )
        self.batch_first, self.num_layers = source.batch_first, source.num_layers
        self.directions = 2 if source.bidirectional else 1
        self.lstm = source.mode == "LSTM"
        self.cells = nn.ModuleList(
            Cell(source, layer, bool(way)) for layer in range(source.num_layers) for way in range(self.directions)
        )
        self.states: list[list[Tensor]] = []
        self.inputs: list[list[Tensor]] = []
        self._keep = False

    @contextmanager
    def keep_signals(self) -> Iterator[None]:
        """Forward passes inside keep the signals at their states: `state.grad` after the backward pass."""
        self._keep = True
        try:
            yield
        finally:
            self._keep = False

    def forward(self, x: Tensor, initial: Any = None) -> tuple[Tensor, Any]:
        """Output of the last layer and the final states, with the shapes of the fused module.

        Args:
            x: (time, batch, I), or (batch, time, I) with `batch_first`; without a batch (time, I).
            initial: None, h0, or (h0, c0) for an LSTM.

        Returns:
            (output, h_n) or (output, (h_n, c_n)).

        Raises:
            TypeError: a packed sequence.
        """
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Unrolled(x): expected a padded tensor, got {type(x).__name__}. Use pad_packed_sequence before it."
            )
        alone = x.dim() == 2
        series = x.unsqueeze(1) if alone else (x.transpose(0, 1) if self.batch_first else x)
        self.states, self.inputs = [], []
        finals = []
        for layer in range(self.num_layers):
            sides = []
            for way in range(self.directions):
                number = layer * self.directions + way
                outputs = self._run(number, series, self._start(number, series, initial, alone), bool(way))
                sides.append(outputs)
                finals.append(self.states[number][-1])
            series = torch.cat(sides, -1)
        output = series.squeeze(1) if alone else (series.transpose(0, 1) if self.batch_first else series)
        final = torch.stack(finals)
        final = final.squeeze(1) if alone else final
        if self.lstm:
            hidden, memory = final.chunk(2, -1)
            return output, (hidden.contiguous(), memory.contiguous())
        return output, final

    def _start(self, number: int, series: Tensor, initial: Any, alone: bool) -> Tensor:
        cell = self.cells[number]
        assert isinstance(cell, Cell)
        if initial is None:
            return series.new_zeros(series.shape[1], cell.state_size)
        parts = [part[number] for part in (initial if self.lstm else (initial,))]
        return torch.cat([part.unsqueeze(0) if alone else part for part in parts], -1)

    def _run(self, number: int, series: Tensor, state: Tensor, reverse: bool) -> Tensor:
        cell = self.cells[number]
        assert isinstance(cell, Cell)
        steps = list(series.unbind(0))
        if reverse:
            steps.reverse()
        states = [state]
        for x in steps:
            states.append(cell(x, states[-1]))
            if self._keep and states[-1].requires_grad:
                states[-1].retain_grad()
        self.states.append(states)
        self.inputs.append(steps)
        outputs = [entry[..., : cell.hidden_size] for entry in states[1:]]
        return torch.stack(outputs[::-1] if reverse else outputs)


def squared_gains(
    cell: Cell, inputs: Tensor, states: Tensor, signals: Tensor, *, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared norms of the signal before and after each step's transposed factor.

        before = ||d_{t+1}||^2,   after = ||J_t^T d_{t+1}||^2,   J_t = d h_{t+1} / d h_t

    States and signals are constants, so the steps do not depend on each other and run as one batch.

    Args:
        cell: the recurrence.
        inputs: (T, batch, I).
        states: (T, batch, S), the state that enters each step.
        signals: (T, batch, S), the signal d_{t+1} at the state that leaves each step.
        differentiable: keep the graph towards the recurrent weight, and towards nothing else.

    Returns:
        (before, after), each (T, batch).
    """
    time, batch, size = states.shape
    here = states.detach().reshape(time * batch, size).requires_grad_()
    entering = signals.detach().reshape(time * batch, size)
    weight = cell.weight_hh if differentiable else cell.weight_hh.detach()
    with torch.enable_grad():
        there = cell.step(inputs.detach().reshape(time * batch, -1), here, weight, constant=True)
        (pulled,) = torch.autograd.grad(there, here, entering, create_graph=differentiable)
    before = entering.square().sum(-1).reshape(time, batch)
    return before, pulled.square().sum(-1).reshape(time, batch)


def lyapunov_exponents(step: Callable[[int, Tensor], Tensor], states: list[Tensor], num: int = 4) -> list[float]:
    """Mean logarithmic growth of the leading directions along a trajectory.

        J_t Q_t = Q_{t+1} R_t,   lambda_i = mean over t of log |R_t[i, i]|

    An exponent above 0 means that the forward state and the backward signal grow by exp(lambda) a step, so
    the gradient through T steps by exp(lambda T): explosion. Far below 0 it vanishes.

    Args:
        step: `step(t, state) -> next state` for one sample, (S,) to (S,).
        states: the states (S,) that enter the steps, in order.
        num: how many exponents.

    Returns:
        The exponents, natural logarithm a step, largest first; -inf where a direction is lost.

    >>> doubling = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))
    >>> trajectory = [torch.zeros(2, dtype=torch.float64)] * 40
    >>> found = lyapunov_exponents(lambda t, h: doubling @ h, trajectory, num=2)
    >>> [round(value, 3) for value in found]                                   # log 2, log 1/2
    [0.693, -0.693]

    Source: the QR method of Benettin et al. 1980.
    """
    size = states[0].numel()
    num = min(num, size)
    # the identity's first columns could lie in an invariant subspace; a fixed mixed start cannot
    seed = torch.arange(1, size * num + 1, dtype=states[0].dtype, device=states[0].device).reshape(size, num)
    directions, _ = torch.linalg.qr(torch.cos(seed * 12.9898))
    total = torch.zeros(num, dtype=torch.float64, device=states[0].device)
    # the start is forgotten over the first tenth of the trajectory
    skip = len(states) // 10
    for time, state in enumerate(states):
        pushed = torch.func.vmap(
            lambda v, time=time, state=state: torch.func.jvp(lambda h: step(time, h), (state,), (v,))[1]
        )(directions.T)
        directions, upper = torch.linalg.qr(pushed.T)
        if time >= skip:
            total += upper.diagonal().abs().to(torch.float64).log()
    return sorted((total / max(1, len(states) - skip)).tolist(), reverse=True)


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
