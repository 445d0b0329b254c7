"""How large each node may be: one file a rule, `project` from limits to scales, and the ledger that keeps history."""

from .base import Budget, Line, Reading, State, limits_after, limits_of
from .decision import Decision, Outcome, Term, begin, decide, terms_of
from .ema import Ema
from .fixed import Fixed
from .ledger import Ledger, StagedLedger, make_ledger, warn_of_idle_limits
from .percentile import Percentile
from .projection import RULES, project
from .registry import BUDGETS, DEFAULT_IN_FRONT, DEFAULT_OF_GSO, DEFAULT_OF_SPLITTER, budgets_by_level, register
from .relative import Relative
from .relative_step import RelativeStep
from .running_median import RunningMedian
from .sums import LARGE, Nodes, sums_for
from .zscore import ZScore

__all__ = [
    "BUDGETS",
    "DEFAULT_IN_FRONT",
    "DEFAULT_OF_GSO",
    "DEFAULT_OF_SPLITTER",
    "LARGE",
    "RULES",
    "Budget",
    "Decision",
    "Ema",
    "Fixed",
    "Ledger",
    "Line",
    "Nodes",
    "Outcome",
    "Percentile",
    "Reading",
    "Relative",
    "RelativeStep",
    "RunningMedian",
    "StagedLedger",
    "State",
    "Term",
    "ZScore",
    "begin",
    "budgets_by_level",
    "decide",
    "limits_after",
    "limits_of",
    "make_ledger",
    "project",
    "register",
    "sums_for",
    "terms_of",
    "warn_of_idle_limits",
]
