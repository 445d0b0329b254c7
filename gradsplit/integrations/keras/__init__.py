"""Keras 3, on TensorFlow, torch or JAX: any optimizer as a splitting one, GSO, and a callback that names bins.

Importing this package registers the splitting classes, so that `keras.saving.load_model` finds them.
"""

from __future__ import annotations

try:
    import keras as _keras
except ImportError as error:
    if (error.name or "").partition(".")[0] == "keras":
        raise ImportError(
            "gradsplit.integrations.keras: expected the package keras. Run: pip install 'gradsplit[keras]', and set "
            "KERAS_BACKEND to tensorflow (pip install tensorflow), torch or jax."
        ) from error
    raise ImportError(
        f"gradsplit.integrations.keras: expected the backend that Keras is set to, got none ({error}). Install it, or "
        "set KERAS_BACKEND to tensorflow, torch or jax before Keras is imported."
    ) from error

from .gso import GSO
from .layout import energies, layout_of
from .report import SplitCallback
from .split import split, splitting_class

__all__ = ["GSO", "SplitCallback", "energies", "layout_of", "split", "splitting_class"]

del _keras
