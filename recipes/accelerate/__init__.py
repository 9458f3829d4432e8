"""Configurations of accelerate, which `m2mkd run --accelerate NAME` takes by name."""
