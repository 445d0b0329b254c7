"""Unrolled: a recurrent module that runs step by step, so that its time steps are joints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsplit.chain.cells import Cell


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
