"""Evaluation of saved models."""
