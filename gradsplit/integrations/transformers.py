"""Hugging Face's Trainer: bounded gradients as a callback."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..hooks import Handle
from ..splitter import GradientSplitter
from .attached import attached, refuse_own_bound

__all__ = ["GradientSplitting"]


class GradientSplitting(TrainerCallback, ExportableState):
    """Bound each bin of the gradient between ``on_pre_optimizer_step`` and the update, *instead of* ``max_grad_norm``.

    The splitter's state is written into every checkpoint's ``trainer_state.json`` and taken up on resuming.

    Args:
        plan: see `gradsplit.GradientSplitter`.
        budget: likewise; the default fits the optimizer.
        options: its other arguments.

    Attributes:
        splitter: over the parameters that the optimizer holds; None before training has begun.

    Raises:
        ValueError: ``TrainingArguments(max_grad_norm=…)`` is not 0, or ``restore_callback_states_from_checkpoint``.

    >>> GradientSplitting(plan="per_tensor", budget="fixed").splitter is None
    True
    """

    def __init__(self, plan: Any = "xsp", budget: Any = None, **options: Any) -> None:
        self._options = {"plan": plan, "budget": budget, **options}
        self._handle: Handle | None = None
        self.splitter: GradientSplitter | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Attach to the optimizer below the Trainer's wrapper."""
        refuse_own_bound("TrainingArguments(max_grad_norm", args.max_grad_norm, "Set max_grad_norm=0")
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "TrainingArguments(restore_callback_states_from_checkpoint=True): expected False with "
                "GradientSplitting, since Trainer would make the callback anew without its plan and budget. Leave it "
                "out: the splitter's state is restored all the same."
            )
        self._detach()
        self.splitter, self._handle = attached(model, getattr(optimizer, "optimizer", optimizer), self._options)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.splitter.load_state_dict(_from_text(saved["attributes"]["saved"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def state(self) -> dict[str, Any]:
        """Return what Trainer writes as JSON."""
        saved = None if self.splitter is None else _as_text(self.splitter.state_dict())
        return {"args": {}, "attributes": {"saved": saved}}


def _as_text(state: dict[str, Any]) -> str:
    """The bytes of ``torch.save``. JSON with one number per line would be thirty times as long."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _from_text(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state
