"""What is patched in torch while a script is watched, so that its losses and its own bound are seen.

- ``Tensor.backward`` and ``GradScaler.scale``, for the losses: see `Losses`.
- ``torch.nn.utils.clip_grad_norm_``, for the bound that the script sets itself: see `watch_own_bound`.

Each of them still does what it did. Nothing else in torch is replaced: a session attaches to optimizers by torch's own
hooks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

__all__ = ["watch_own_bound", "Losses"]

Before = Callable[[list[Tensor]], None]
After = Callable[[list[Tensor], Tensor], None]


def watch_own_bound(before: Before, after: After) -> None:
    """Call ``before(parameters)`` and ``after(parameters, factor)`` around each ``clip_grad_norm_`` of the script.

    The factor is a tensor, ``min(1, max_norm / (norm + 1e-6))``, from the norm that torch's function returned. It is
    nan where that norm was not finite, because torch's function then spreads nan to every gradient. The script gets the
    same results as without us.
    """
    original = clip_grad.clip_grad_norm_

    @functools.wraps(original)
    def watched(parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return original(parameters, max_norm, norm_type, *args, **kwargs)
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        before(tensors)
        norm = original(tensors, max_norm, norm_type, *args, **kwargs)
        factor = (float(max_norm) / (norm.detach() + 1e-6)).clamp(max=1.0)
        after(tensors, torch.where(torch.isfinite(norm), factor, torch.full_like(factor, float("nan"))))
        return norm

    clip_grad.clip_grad_norm_ = watched
    torch.nn.utils.clip_grad_norm_ = watched


class Losses:
    """The sum of all scalars that backward was called on since the last step: the one whose gradient the step uses.

    A loss multiplied by a gradient scaler is seen as it was before. Tensors stay on their device.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._last: Tensor | float = float("nan")
        self._unscaled: tuple[weakref.ref[Tensor], Tensor] | None = None

    def take(self) -> Tensor | float:
        """Return the sum and start anew; a second optimizer that steps on the same backward gets it again."""
        if self._sum is not None:
            self._last, self._sum = self._sum, None
        return self._last

    def note(self, loss: Tensor) -> None:
        """Add a scalar that backward is called on."""
        if loss.numel() != 1 or not (loss.is_floating_point() or loss.is_complex()):
            return
        if self._unscaled is not None and self._unscaled[0]() is loss:
            value = self._unscaled[1]
        else:
            value = loss.detach().reshape(()).clone()
        if type(value) is not Tensor:  # a DTensor's sum would be a collective
            value = value.to_local() if hasattr(value, "to_local") else value.as_subclass(Tensor)
        same = self._sum is not None and self._sum.device == value.device
        self._sum = self._sum + value if same and self._sum is not None else value

    def note_scaled(self, outputs: Any, scaled: Any) -> None:
        """Remember what a gradient scaler multiplied."""
        if isinstance(outputs, Tensor) and isinstance(scaled, Tensor) and outputs.numel() == 1:
            self._unscaled = (weakref.ref(scaled), outputs.detach().reshape(()).clone())

    def install(self) -> None:
        """Look at every ``Tensor.backward`` and ``GradScaler.scale`` from now on; both do what they did."""
        backward, scale = Tensor.backward, torch.amp.GradScaler.scale

        @functools.wraps(backward)
        def seen_backward(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.note(tensor)
            return backward(tensor, *args, **kwargs)

        @functools.wraps(scale)
        def seen_scale(scaler: Any, outputs: Any) -> Any:
            scaled = scale(scaler, outputs)
            self.note_scaled(outputs, scaled)
            return scaled

        for owner, name, seen in ((Tensor, "backward", seen_backward), (torch.amp.GradScaler, "scale", seen_scale)):
            setattr(owner, name, seen)
