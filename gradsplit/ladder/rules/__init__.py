"""Rules for power series, one file per family; an import of this package fills the table."""

from . import branches, elementwise, extremes, normalisation, products, shapes
from .registry import RULES, UnsupportedOperation, linear, rule, rule_of

__all__ = [
    "RULES",
    "UnsupportedOperation",
    "linear",
    "rule",
    "rule_of",
    "branches",
    "elementwise",
    "extremes",
    "normalisation",
    "products",
    "shapes",
]
