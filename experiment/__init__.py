"""Experiments: a recipe, its phases, and the report of their results."""
