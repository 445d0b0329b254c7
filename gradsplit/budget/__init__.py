"""How large each node may be: one file a rule, `project` from limits to scales, and the ledger that keeps history."""

from .base import Budget, Reading, State, limits_after, limits_of
from .ema import Ema
from .fixed import Fixed
from .ledger import Decision, Ledger, Outcome
from .node_sums import Nodes
from .percentile import Percentile
from .project import RULES, project
from .registry import BUDGETS, budgets_by_level
from .relative import Relative
from .relative_step import RelativeStep
from .zscore import ZScore

__all__ = [
    "BUDGETS",
    "RULES",
    "Budget",
    "Decision",
    "Ema",
    "Fixed",
    "Ledger",
    "Nodes",
    "Outcome",
    "Percentile",
    "Reading",
    "Relative",
    "RelativeStep",
    "State",
    "ZScore",
    "budgets_by_level",
    "limits_after",
    "limits_of",
    "project",
]
