"""Reading and scaling bins: the definition, and backends that must equal it."""

from .kernel import BACKENDS, Backend, Kernel, choose_backend, make_kernel, squares_of

__all__ = ["BACKENDS", "Backend", "Kernel", "choose_backend", "make_kernel", "squares_of"]
