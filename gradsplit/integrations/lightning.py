"""Lightning: bounded gradients as a callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..hooks import Handle
from ..splitter import GradientSplitter
from .attached import attached, refuse_own_bound

__all__ = ["GradientSplitting"]


class GradientSplitting(Callback):
    """Bound each bin of the gradient before every step of every optimizer, *instead of* ``gradient_clip_val``.

    There is one splitter per optimizer, over the parameters that it holds, with automatic and with manual optimisation.
    The state of the splitters travels in Lightning's checkpoints.

    Args:
        plan: see `gradsplit.GradientSplitter`.
        budget: likewise; the default fits the optimizer.
        options: its other arguments.

    Attributes:
        splitters: one per optimizer, once training has begun.

    Raises:
        ValueError: ``Trainer(gradient_clip_val=…)`` is set; a checkpoint of another number of optimizers.

    >>> GradientSplitting(plan="per_tensor", budget="fixed").splitters
    []
    """

    def __init__(self, plan: Any = "xsp", budget: Any = None, **options: Any) -> None:
        self._options = {"plan": plan, "budget": budget, **options}
        self._handles: list[Handle] = []
        self._saved: list[dict[str, Any]] | None = None
        self.splitters: list[GradientSplitter] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; Lightning has restored its optimizers by now."""
        refuse_own_bound("Trainer(gradient_clip_val", trainer.gradient_clip_val, "Leave gradient_clip_val out")
        self._detach()
        pairs = [attached(pl_module, optimizer, self._options) for optimizer in trainer.optimizers]
        self.splitters, self._handles = [s for s, _ in pairs], [h for _, h in pairs]
        saved, self._saved = self._saved, None
        if saved is None:
            return
        if len(saved) != len(self.splitters):
            self._detach()
            raise ValueError(
                f"GradientSplitting.load_state_dict(…): expected the state of {len(self.splitters)} optimizers, got "
                f"{len(saved)}. Resume with the optimizers of the saved run."
            )
        for splitter, state in zip(self.splitters, saved, strict=True):
            splitter.load_state_dict(state)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every splitter, in the order of the optimizers."""
        return {"splitters": [splitter.state_dict() for splitter in self.splitters]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until the splitters are there."""
        self._saved = list(state_dict["splitters"])
