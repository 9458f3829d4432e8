"""Tests saved models."""
