"""Plans: the expected cost of a recipe."""
