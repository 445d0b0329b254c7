"""How large each node may be: one file a rule, `project` from limits to scales, and the ledger that keeps history."""

from .base import Budget, Reading, State, limits_after, limits_of
from .deciding import Term, begin, decide, terms_of
from .decision import Decision, Outcome
from .ema import Ema
from .fixed import Fixed
from .ledger import Ledger, warn_of_idle_limits
from .length_sums import LARGE, sums_for
from .node_sums import Nodes
from .over_stages import StagedLedger, make_ledger
from .percentile import Percentile
from .project import RULES, project
from .registry import BUDGETS, DEFAULT_OF_GSO, DEFAULT_OF_SPLITTER, budgets_by_level
from .relative import Relative
from .relative_step import RelativeStep
from .zscore import ZScore

__all__ = [
    "BUDGETS",
    "DEFAULT_OF_GSO",
    "DEFAULT_OF_SPLITTER",
    "LARGE",
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
    "sums_for",
    "terms_of",
    "warn_of_idle_limits",
]
