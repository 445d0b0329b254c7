"""One time step of torch's recurrent modules, written out: state in, state out.

A state is one tensor (batch, S): the hidden vector, and for an LSTM the hidden vector followed by the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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
