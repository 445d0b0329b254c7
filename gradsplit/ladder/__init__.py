"""Taylor mode: derivatives of every order along a bin, the radius of their series, and the step that it foretells."""

from .ladder import Ladder, taylor_ladder
from .model import ladder_of_model, loss_of_model
from .recipe import Climb, RecipeStep, recipe_of
from .rules import UnsupportedOperation, rule
from .signedlog import SignedLog
from .table import climb_figure, climb_rows, ladder_figure, ladder_rows, ladder_table

__all__ = [
    "Climb",
    "Ladder",
    "RecipeStep",
    "SignedLog",
    "UnsupportedOperation",
    "climb_figure",
    "climb_rows",
    "ladder_figure",
    "ladder_of_model",
    "ladder_rows",
    "ladder_table",
    "loss_of_model",
    "recipe_of",
    "rule",
    "taylor_ladder",
]
