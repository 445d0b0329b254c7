"""GSO, the gradient-splitting optimizer, its updates, and blocks that take turns around any optimizer."""

from .cyclic import CyclicBlocks
from .gso import GSO

__all__ = ["GSO", "CyclicBlocks"]
