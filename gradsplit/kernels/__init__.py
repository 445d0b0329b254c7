"""Reading and scaling bins: the definition, and backends that must equal it."""

from .kernel import BACKENDS, Backend, Formula, FormulaPart, Kernel, choose_backend, register

__all__ = ["BACKENDS", "Backend", "Formula", "FormulaPart", "Kernel", "choose_backend", "register"]
