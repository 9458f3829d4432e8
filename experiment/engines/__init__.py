"""Engines: what does the phases of a run, where."""
