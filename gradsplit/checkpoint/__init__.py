"""Checkpoints: plain data only, replaced whole, verified, and loaded whole; and the data position."""

from .batches import Batches
from .checkpoint import load_checkpoint, save_checkpoint
from .errors import CheckpointError

__all__ = ["Batches", "CheckpointError", "load_checkpoint", "save_checkpoint"]
