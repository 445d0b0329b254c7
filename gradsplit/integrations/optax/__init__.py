"""optax: gradient transformations that bound each bin of a gradient, or of an update, by a budget of its own."""

try:
    import jax
    import optax
except ImportError as error:
    raise ImportError(
        "gradsplit.integrations.optax: expected the packages jax and optax. Run: pip install 'gradsplit[jax]'"
    ) from error

from .gso import GsoOptState, GsoShareState, gso
from .sources import SampleState, TermState, split_samples, split_terms
from .splitting import SplitState, cap_updates, split_gradients
from .transformation import LastStep, SplitTransformation
from .trees import energies_of, layout_of

__all__ = [
    "GsoOptState",
    "GsoShareState",
    "LastStep",
    "SampleState",
    "SplitState",
    "SplitTransformation",
    "TermState",
    "cap_updates",
    "energies_of",
    "gso",
    "layout_of",
    "split_gradients",
    "split_samples",
    "split_terms",
]

del jax, optax
