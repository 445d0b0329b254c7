"""GSO, the gradient-splitting optimizer, and its updates."""

from .gso import GSO

__all__ = ["GSO"]
