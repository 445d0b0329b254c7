"""Guard: going back to a snapshot when a run diverges, and going on."""

from .batches import Batches
from .checkpoint import load_checkpoint, save_checkpoint
from .guard import DivergenceError, Guard
from .plain import CheckpointError

__all__ = ["DivergenceError", "Guard", "Batches", "CheckpointError", "load_checkpoint", "save_checkpoint"]
