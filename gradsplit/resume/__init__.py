"""Going back and going on: the guard returns to a snapshot when a run diverges; checkpoints continue a killed run."""

from .batches import Batches
from .checkpoint import load_checkpoint, save_checkpoint
from .guard import DivergenceError, Guard
from .plain import CheckpointError

__all__ = ["DivergenceError", "Guard", "Batches", "CheckpointError", "load_checkpoint", "save_checkpoint"]
