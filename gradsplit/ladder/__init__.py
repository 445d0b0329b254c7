"""Taylor mode: derivatives of every order along a bin, the radius of the series, the step it still foretells."""

from gradsplit.ladder.ladder import Ladder, taylor_ladder
from gradsplit.ladder.model import ladder_of_model, loss_of_model
from gradsplit.ladder.recipe import Climb, RecipeStep, recipe_of
from gradsplit.ladder.rules import UnsupportedOperation, rule
from gradsplit.ladder.signedlog import SignedLog
from gradsplit.ladder.table import climb_figure, climb_rows, ladder_figure, ladder_rows, ladder_table

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
