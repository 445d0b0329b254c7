"""Guard: going back to a snapshot when a run diverges, and going on."""

from .errors import DivergenceError
from .guard import Guard

__all__ = ["DivergenceError", "Guard"]
