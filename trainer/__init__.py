"""Training: `M2MKDTrainer`, `AlignmentTrainer` and their arguments."""
