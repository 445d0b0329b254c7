"""Taylor mode: derivatives of every order along a bin, the radius of the series, the step it still foretells."""

from gradsplit.ladder.ladder import Ladder, taylor_ladder
from gradsplit.ladder.recipe import Climb, RecipeStep, recipe_of
from gradsplit.ladder.rules import UnsupportedOperation, rule
from gradsplit.ladder.signedlog import SignedLog

__all__ = ["Climb", "Ladder", "RecipeStep", "SignedLog", "UnsupportedOperation", "recipe_of", "rule", "taylor_ladder"]
