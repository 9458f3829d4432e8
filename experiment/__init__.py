"""Experiments: a recipe, its phases, and the report of what they found."""
