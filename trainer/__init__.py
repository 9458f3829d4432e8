"""Training: `M2MKDTrainer` and its arguments, recipes, and the runner behind `train.py`."""
