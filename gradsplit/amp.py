"""Modes of torch: what a GradScaler has done to the gradients, and how a step leaves autocast and a default device.

The one module that knows torch's `GradScaler`. Nothing here waits for the device. Since scales are powers of two,
limits in unscaled units come out the same bit for bit, whatever the scale.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Scaling", "Unscaled", "undisturbed", "with_cpu_default"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Scaling:
    """How gradients stand to a GradScaler.

    Attributes:
        scale: 0-d, what the gradients are still multiplied by; None: they have been unscaled.
        found_inf: 0-d, above 0 where the scaler found a value that is not finite; None: it has not looked yet.
    """

    scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer | None, scaler: torch.amp.GradScaler | None) -> Scaling | None:
        """Return how gradients stand to a scaler: one that is named, or one in whose ``step()`` this happens.

        Raises:
            ValueError: a scaler without an optimizer.
        """
        if scaler is None:
            return None if optimizer is None else cls.of_step(optimizer)
        if optimizer is None:
            raise ValueError(
                "GradientSplitter.step(scaler=…): expected an optimizer, since a GradScaler unscales for each one by "
                "itself. Pass optimizer=… at construction."
            )
        return cls.of_scaler(scaler, optimizer)

    @classmethod
    def of_step(cls, optimizer: torch.optim.Optimizer) -> Scaling | None:
        """Return what a GradScaler tells an optimizer that handles scales by itself, while it steps; None: no scaler.

        torch's protocol of ``_step_supports_amp_scaling``: the scaler sets ``grad_scale`` and ``found_inf`` around
        ``step()``, whether or not there was an overflow; ``grad_scale`` is None after an explicit ``unscale_``.
        """
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return None
        scale = getattr(optimizer, "grad_scale", None)
        # Without any gradient the scaler's sum of findings is the number 0.
        return cls(None if scale is None else torch.as_tensor(scale), torch.as_tensor(found_inf))

    @classmethod
    def of_scaler(cls, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Scaling | None:
        """Return how an optimizer's gradients stand to a scaler between ``backward()`` and ``scaler.step()``.

        Whether ``unscale_`` has been called is on record in the scaler alone, in an attribute that torch keeps private.

        Raises:
            TypeError: something else than a GradScaler.
        """
        if not hasattr(scaler, "is_enabled"):
            raise TypeError(
                f"GradientSplitter.step(scaler={type(scaler).__name__}): expected a torch.amp.GradScaler. Without one, "
                "write step()."
            )
        if not scaler.is_enabled():
            return None
        found = scaler._per_optimizer_states.get(id(optimizer), {}).get("found_inf_per_device")
        if not found:
            device = optimizer.param_groups[0]["params"][0].device
            return cls(scaler.scale(torch.ones((), device=device)), None)
        return cls(None, torch.stack([t.reshape(()) for t in found.values()]).sum())

    def overflow(self, squares_B: Tensor | None = None) -> Tensor:
        """Return whether this step will be left out, 0-d bool; where the scaler has not looked, the bins tell."""
        if self.found_inf is not None:
            device = self.found_inf.device if squares_B is None else squares_B.device
            return self.found_inf.to(device).reshape(()) > 0
        assert squares_B is not None
        return ~squares_B.isfinite().all()

    def unscaled_squares(self, squares_B: Tensor) -> Tensor:
        """Return squares in unscaled units, from those of gradients that may still carry the scale."""
        if self.scale is None:
            return squares_B
        inverse: Any = self._inverse(squares_B)
        return squares_B * inverse * inverse

    def unscaled(self, gradient: Tensor) -> Tensor:
        """Return a gradient in unscaled units: itself, or a copy."""
        if self.scale is None:
            return gradient
        unscaled: Tensor = gradient * self._inverse(gradient)
        return unscaled

    def plain(self, gradient: Tensor) -> Tensor:
        """Return a gradient for code that knows no scaler: in unscaled units, and all nan on an overflow."""
        return torch.where(self.overflow(gradient), torch.nan, self.unscaled(gradient))

    def _inverse(self, like: Tensor) -> Tensor:
        assert self.scale is not None
        # The reciprocal first: the usual scale, 65536, is itself above float16.
        return self.scale.to(like.device).reshape(()).float().reciprocal().to(like.dtype)


class Unscaled:
    """Tells once where a GradScaler unscales gradients after they were bounded, so that limits met its scale.

    Only a step of the optimizer inside that of a scaler is looked at, and there the scaler has just waited for the
    device itself.

    Args:
        optimizer: whose steps are looked at, until the first one that tells.
        tell: is called with the words.
    """

    SCALE = 1024.0  # a smaller ratio may be another clip's

    def __init__(self, optimizer: torch.optim.Optimizer, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._seen: tuple[Tensor, Tensor] | None = None
        self._is_over = False
        self._hook: Any = optimizer.register_step_pre_hook(self._look)

    def note(self, parameters: Sequence[Tensor]) -> bool:
        """Take note of one gradient as it was bounded; return whether there is still something to look for."""
        if self._is_over:
            self._hook.remove()
            return False
        for p in reversed(parameters):  # not a shard's, whose maximum would wait for all ranks
            if type(p.grad) is Tensor and p.grad.layout == torch.strided and p.grad.numel():
                self._seen = p, p.grad.detach().abs().amax()
                break
        return True

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._is_over or self._seen is None:
            return
        (parameter, before), self._seen = self._seen, None
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code is not torch.amp.GradScaler.step.__code__:
            frame = frame.f_back
        scaler = None if frame is None else frame.f_locals.get("self")
        if scaler is None or not scaler.is_enabled() or parameter.grad is None:
            self._is_over = True
            return
        scale, size, now = scaler.get_scale(), float(before), float(parameter.grad.detach().abs().amax())
        carried = getattr(optimizer, "grad_scale", None) is not None
        self._is_over = size > 0
        if carried or (size > 0 and scale >= self.SCALE and now * scale <= 1.01 * size):
            self._is_over = True
            self._tell(
                f"GradientSplitter.step(): a GradScaler took its scale, {scale:g}, out of the gradients after they "
                "were bounded, so that limits met scaled gradients. Write splitter.step(scaler=scaler), or attach the "
                "splitter."
            )


def with_cpu_default(function: Function) -> Function:
    """Return a function in which tensors without a named device are made on the CPU, as outside of all modes.

    ``torch.set_default_device`` may name another one, on which tables for compiled loops must not lie.

    >>> made = with_cpu_default(torch.zeros)
    >>> with torch.device("meta"):
    ...     made(1).device
    device(type='cpu')
    """

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]


def undisturbed(device: str, act: Callable[..., None], *arguments: Any) -> None:
    """Call something outside of regions of autocast, of inference mode and of a default device.

    So products are computed in the dtypes that were chosen for them, memories can be written in any later step, and
    tables lie where compiled loops read them.
    """
    if not torch.compiler.is_compiling() and torch.get_default_device().type != "cpu":
        with torch.device("cpu"):
            undisturbed(device, act, *arguments)
    elif torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            undisturbed(device, act, *arguments)
    elif not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # a traced step knows no such mode
        with torch.inference_mode(False), torch.no_grad():  # gradients were off, and leaving turns them on
            undisturbed(device, act, *arguments)
    else:
        act(*arguments)
