"""Distillation module by module: stages, stitches, pairs and their losses."""
