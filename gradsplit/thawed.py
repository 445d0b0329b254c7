"""What was frozen when a splitter was made and trains now: no bin holds it, so it is named, once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["Thawed"]


class Thawed:
    """Warn of parameters that were frozen at first and have a gradient now; a plan does not grow.

    Args:
        model: whose frozen parameters are watched; pairs (name, parameter) are taken as all that is meant.

    >>> model = torch.nn.Linear(2, 1)
    >>> thawed = Thawed(model.requires_grad_(False))
    >>> model.requires_grad_(True)(torch.ones(1, 2)).sum().backward()
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     thawed.look(call="step()")
    >>> str(told[0].message)[:35]
    'step(): weight, bias had requires_g'
    """

    def __init__(self, model: Any) -> None:
        named = model.named_parameters() if hasattr(model, "named_parameters") else ()
        self._frozen: list[tuple[str, Tensor]] = [(name, p) for name, p in named if not p.requires_grad]

    def look(self, *, call: str) -> None:
        """Name what trains without a bound, each parameter once.

        Warns:
            UserWarning: a parameter that was frozen when the splitter was made has a gradient.
        """
        if not self._frozen or torch.compiler.is_compiling():
            return
        names = [name for name, parameter in self._frozen if parameter.grad is not None]
        if names:
            self._frozen = [pair for pair in self._frozen if pair[0] not in names]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warnings.warn(
                f"{call}: {', '.join(names[:3])}{more} had requires_grad=False when the splitter was made and trains "
                "now: no limit holds there. Make the splitter while all that will ever train is trainable, then "
                "freeze; or make a new one now.",
                UserWarning,
                stacklevel=4,
            )
