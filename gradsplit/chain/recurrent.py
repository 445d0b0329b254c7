"""The chain through time: recurrent modules step by step, the gains of their steps, and the penalty on these gains.

A state is one tensor (batch, S): the hidden vector, followed by the memory for an LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .chain import Recurrence


class Cell(nn.Module):
    """One layer and direction of an `nn.RNN`, `nn.GRU` or `nn.LSTM`, one step at a time.

    The parameters are the tensors of the fused module itself, so training one trains the other.

    Args:
        source: the fused module.
        layer: its layer.
        reverse: the backward direction of a bidirectional module.

    Raises:
        ValueError: the module projects its output (`proj_size`); there is no cell for that here.

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
                "Put an nn.Linear after the recurrence instead."
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

        With `constant`, a derivative of the step's Jacobian sees the weight only where it multiplies the state. The
        other parameters, and the slopes of the activations, are constants.
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

    A fused module computes all steps in one operation, so nothing between them can be measured or bounded. This module
    calls a `Cell` at every step. It shares the fused module's parameters and takes about five times as long.

    Args:
        source: the fused module; dropout between layers is not supported.

    Raises:
        ValueError: `proj_size`, or dropout between layers.

    Attributes:
        states: after a call, for each layer and direction the list of its states (batch, S) in the order of the
            steps, the initial state first. They belong to the graph, so `retain_grad` works on them.
        inputs: in the same way the inputs (batch, I) of every step.

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
        """Forward passes inside the context keep the signals at their states, as `state.grad` after backward."""
        self._keep = True
        try:
            yield
        finally:
            self._keep = False

    def forward(self, x: Tensor, initial: Any = None) -> tuple[Tensor, Any]:
        """Return the output of the last layer and the final states, in the shapes of the fused module.

        Args:
            x: (time, batch, I), or (batch, time, I) with `batch_first`, or (time, I) without a batch.
            initial: None, h0, or (h0, c0) for an LSTM.

        Returns:
            (output, h_n) or (output, (h_n, c_n)).

        Raises:
            TypeError: a packed sequence.
        """
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Unrolled(x): expected a padded tensor, got {type(x).__name__}. Call pad_packed_sequence first."
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


def squared_norms(
    cell: Cell, inputs: Tensor, states: Tensor, signals: Tensor, *, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared norms of the signal before and after each step's transposed factor; their ratio is the squared gain.

        before = ||d_{t+1}||^2,   after = ||J_t^T d_{t+1}||^2,   J_t = d h_{t+1} / d h_t

    States and signals are constants here, so the steps do not depend on each other and run as one batch.

    Args:
        cell: the recurrence.
        inputs: (T, batch, I).
        states: (T, batch, S), the state that enters each step.
        signals: (T, batch, S), the signal d_{t+1} at the state that leaves each step.
        differentiable: whether to keep the graph to the recurrent weight; there is none to anything else.

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
    wide = torch.promote_types(states.dtype, torch.float32)  # halves would lose digits, or overflow
    before, after = (x.to(wide).square().sum(-1).reshape(time, batch) for x in (entering, pulled))
    return before, after


def lyapunov_exponents(step: Callable[[int, Tensor], Tensor], states: list[Tensor], num: int = 4) -> list[float]:
    """Mean logarithmic growth of the leading directions along a trajectory.

        J_t Q_t = Q_{t+1} R_t,   lambda_i = mean over t of log |R_t[i, i]|

    With an exponent above 0 the forward state and the backward signal grow by exp(lambda) per step. The gradient
    through T steps then grows by exp(lambda T), which is an explosion. Far below 0 it vanishes.

    Args:
        step: `step(t, state) -> next state` for one sample, (S,) to (S,).
        states: the states (S,) that enter the steps, in order.
        num: how many exponents.

    Returns:
        The exponents, natural logarithm per step, largest first; -inf where a direction is lost.

    >>> doubling = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))
    >>> trajectory = [torch.zeros(2, dtype=torch.float64)] * 40
    >>> found = lyapunov_exponents(lambda t, h: doubling @ h, trajectory, num=2)
    >>> [round(value, 3) for value in found]                                   # log 2, log 1/2
    [0.693, -0.693]

    Source: the QR method of Benettin et al. 1980.
    """
    size = states[0].numel()
    num = min(num, size)
    # The first columns of the identity could lie in an invariant subspace; a fixed mixed start cannot.
    seed = torch.arange(1, size * num + 1, dtype=states[0].dtype, device=states[0].device).reshape(size, num)
    wide = torch.promote_types(states[0].dtype, torch.float32)  # torch has no such decomposition of halves
    directions, _ = torch.linalg.qr(torch.cos(seed * 12.9898).to(wide))
    total = torch.zeros(num, dtype=torch.float64, device=states[0].device)
    # The first tenth of the trajectory is left out, so that the start is forgotten.
    skip = len(states) // 10
    for time, state in enumerate(states):
        pushed = torch.func.vmap(
            lambda v, time=time, state=state: torch.func.jvp(lambda h: step(time, h), (state,), (v,))[1]
        )(directions.T.to(state.dtype))
        directions, upper = torch.linalg.qr(pushed.T.to(wide))
        if time >= skip:
            total += upper.diagonal().abs().to(torch.float64).log()
    return sorted((total / max(1, len(states) - skip)).tolist(), reverse=True)


class Recurrences:
    """Listens to the recurrent modules of a model, and measures their chains afterwards.

    Args:
        modules: name -> module.
        num: Lyapunov exponents per layer.
    """

    def __init__(self, modules: dict[str, nn.RNNBase], num: int = 4) -> None:
        self.modules, self.num = modules, num
        self.calls: dict[str, tuple[Any, ...]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the arguments of each module's first call."""
        with ExitStack() as hooks:
            for name, module in self.modules.items():

                def keep(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    named = (kwargs[key] for key in ("input", "hx") if key in kwargs)
                    self.calls.setdefault(name, (*args, *named))

                hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
            yield

    def measure(self, signals: Mapping[str, list[Tensor]]) -> list[Recurrence]:
        """Gains and exponents of every layer of every module whose outputs a signal reached.

        Args:
            signals: module name -> the signals at the outputs of its first call.
        """
        found = []
        for name, args in self.calls.items():
            module = self.modules[name]
            usable = isinstance(args[0], Tensor) and not getattr(module, "proj_size", 0)
            if name in signals and usable and not (module.dropout and module.num_layers > 1):
                found.extend(_chains(name, module, args, signals[name], self.num))
        return found


def recurrences_of(model: nn.Module) -> Recurrences | None:
    """A listener for the model's fused recurrent modules; None if it has none."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    return Recurrences(modules) if modules else None


def _chains(name: str, module: nn.RNNBase, args: Any, signals: list[Tensor], num: int) -> list[Recurrence]:
    unrolled = Unrolled(module)
    x = args[0].detach().requires_grad_()  # so that frozen weights have a chain too
    start = args[1] if len(args) > 1 else None
    start = tuple(part.detach() for part in start) if isinstance(start, tuple) else start
    with torch.enable_grad(), unrolled.keep_signals():
        output, final = unrolled(x, start)
        ends = [output, *(final if isinstance(final, tuple) else (final,))]
        states = [state for layer in unrolled.states for state in layer[1:]]
        pairs = [(end, signal) for end, signal in zip(ends, signals, strict=False) if end.shape == signal.shape]
        if not pairs:
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
        before, after = squared_norms(cell, input_T, state_T, _lifted(signal_T))
        total = before.sum(1)
        gain_T = torch.where(total > 0, (after.sum(1) / total.clamp(min=1e-38)).sqrt(), torch.nan)
        label = name + (f" layer {number}" if len(unrolled.states) > 1 else "")
        exponents = _exponents(cell, input_T, state_T, num)
        # The first step's factor leads to the initial state. That state is not a variable, but the step counts too.
        found.append(Recurrence(label, [float(g) for g in gain_T.flip(0)], exponents))
    return found


def _lifted(signal_T: Tensor) -> Tensor:
    # A gain does not depend on the scale of its signal, and squares of signals below 1e-19 would vanish in float32.
    largest_T = signal_T.abs().amax(dim=(1, 2), keepdim=True)
    return torch.where(largest_T > 0, signal_T / largest_T.clamp(min=1e-38), signal_T)


def _exponents(cell: Cell, input_T: Tensor, state_T: Tensor, num: int) -> list[float]:
    weight = cell.weight_hh.detach()

    def step(time: int, state: Tensor) -> Tensor:
        with torch.no_grad():
            return cell.step(input_T[time, 0], state, weight, constant=True)

    return lyapunov_exponents(step, list(state_T[:, 0].unbind(0)), num)


def gain_penalty(recurrence: Unrolled | Cell, inputs: Tensor | None = None, states: Tensor | None = None,
                 signals: Tensor | None = None, *, bound: float = 1e-30) -> Tensor:  # fmt: skip
    """The mean squared distance of the squared gain of the backward signal from one, over the steps.

        Omega = mean over steps t and samples of ( ||J_t^T d_{t+1}||^2 / ||d_{t+1}||^2 - 1 )^2

    The penalty draws the product of a recurrence's factors towards one, so that it neither grows nor decays. Only the
    recurrent weight has a gradient; states, signals and the slopes of the activations are constants. For a tanh,
    J_t^T d = W^T ((1 - h_{t+1}^2) d), and only this W is a variable. Use it after the loss's backward pass and before
    any bound on the gradient:

        output, _ = unrolled(x); loss(output).backward(retain_graph=False)
        (alpha * gs.gain_penalty(unrolled)).backward()          # adds to weight_hh.grad

    Args:
        recurrence: an `Unrolled` module whose forward pass ran under `keep_signals()` and whose backward pass has run;
            or a `Cell`, with the three arrays below.
        inputs: (T, batch, I), for a `Cell`.
        states: (T, batch, S), the states that enter the steps.
        signals: (T, batch, S), dL/dh at the states that leave them.
        bound: steps whose squared signal is at most this share of the largest one are left out of the mean.

    Returns:
        The penalty, a scalar with a graph to `weight_hh`; 0 without any signal.

    Raises:
        ValueError: a `Cell` without its arrays, or an `Unrolled` whose signals were not kept.

    Source: Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063, equations 9 and 10; written from the formula.
    Deviations: steps that are left out are taken out of the mean. The authors' code counts them as gain one and divides
    by the share that is left, which gives the same number. The printed equation has plain norms; the authors' code has
    squared ones, and so has this function.

    >>> fused = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False)
    >>> _ = fused.weight_hh_l0.data.fill_(2.0), fused.weight_ih_l0.data.fill_(1.0)
    >>> ones = torch.ones(1, 1, 1)
    >>> round(gain_penalty(Cell(fused), 9 * ones, ones, ones).item(), 4)     # (2^2 - 1)^2
    9.0
    """
    if isinstance(recurrence, Unrolled):
        parts = []
        for number, cell in enumerate(recurrence.cells):
            assert isinstance(cell, Cell)
            kept = [state.grad for state in recurrence.states[number][1:]] if recurrence.states else []
            if not kept or all(grad is None for grad in kept):
                raise ValueError(
                    "gain_penalty(unrolled): expected signals at its states, got none. Run the forward pass inside "
                    "`with unrolled.keep_signals():` and the loss's backward pass before this call."
                )
            known = [torch.zeros_like(s) if s.grad is None else s.grad for s in recurrence.states[number][1:]]
            entering = torch.stack([state.detach() for state in recurrence.states[number][:-1]])
            given = torch.stack([x.detach() for x in recurrence.inputs[number]])
            parts.append(_penalty(cell, given, entering, torch.stack(known), bound))
        return torch.stack(parts).mean()
    if not isinstance(recurrence, Cell):
        raise TypeError(
            f"gain_penalty({type(recurrence).__name__}): expected an Unrolled or a Cell. Write "
            "unrolled = gradsplit.chain.Unrolled(rnn), and run it in place of the recurrence."
        )
    if inputs is None or states is None or signals is None:
        missing = [name for name, x in (("inputs", inputs), ("states", states), ("signals", signals)) if x is None]
        raise ValueError(
            f"gain_penalty(cell, …): expected inputs, states and signals beside a Cell, got none for {missing[0]!r}. "
            "Pass all three, or an Unrolled that kept them."
        )
    return _penalty(recurrence, inputs, states, signals, bound)


def _penalty(cell: Cell, inputs: Tensor, states: Tensor, signals: Tensor, bound: float) -> Tensor:
    # The ratio does not depend on the signal's scale, so the signal is lifted: squares of tiny signals would underflow.
    largest = signals.abs().amax()
    lifted = torch.where(largest > 0, signals / largest, signals)
    before, after = squared_norms(cell, inputs, states, lifted, differentiable=True)
    counts = before > bound * before.amax()
    ratio = after / torch.where(counts, before, torch.ones_like(before))
    excess = torch.where(counts, (ratio - 1).square(), torch.zeros_like(ratio))
    return excess.sum() / counts.sum().clamp(min=1)
