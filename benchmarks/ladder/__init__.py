"""What the ladder costs, how far it can be trusted, and the recipe of 292 steps."""
