"""Trainer of pairs that logs and evaluates statistics of each image."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from m2mkd.trainer.student_trainer import StudentTrainer


# Statistics of one image for one pair; their means are logged and evaluated.
STATISTICS = ("cross_entropy", "accuracy", "kl", "agreement", "boundary_error")


class StatisticsTrainer(StudentTrainer):
    """
    A [`StudentTrainer`] whose predictions are statistics of each image and pair, so that means over a whole data set
    are exact.

    Args:
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): Metrics in addition to the statistics. It
            gets the logits.
        arguments: The other arguments of [`~transformers.Trainer`].
    """

    def __init__(
        self, *, compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None, **arguments: Any
    ):
        self._given_metrics = compute_metrics
        self._statistics: dict[str, torch.Tensor] = defaultdict(float)
        self._num_batches = 0
        super().__init__(compute_metrics=self._metrics, **arguments)

    def _metrics(self, found: EvalPrediction) -> dict[str, float]:
        """Compute the mean statistics, and the given metrics from the logits."""
        if self._given_metrics is None:
            return self._mean_statistics(found.predictions)
        statistics, logits = found.predictions
        given = self._given_metrics(EvalPrediction(predictions=logits, label_ids=found.label_ids))
        return {**self._mean_statistics(statistics), **given}

    def _mean_statistics(self, statistics: np.ndarray) -> dict[str, float]:
        means = statistics.mean(axis=0).reshape(-1, len(STATISTICS))
        return {
            self._metric_name(index, name): float(value)
            for index, values in zip(self.args.pair_indices, means, strict=True)
            for name, value in zip(STATISTICS, values, strict=True)
            if not math.isnan(value)
        }

    def _metric_name(self, index: int, name: str) -> str:
        return f"pair_{index}_{name}" if self.args.num_pairs > 1 else name

    def _add_statistic(self, index: int, name: str, value: torch.Tensor) -> None:
        self._statistics[self._metric_name(index, name)] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean statistics of the pairs since the last log to the Trainer's own entries."""
        if self._num_batches and "loss" in logs:
            names = list(self._statistics)
            means = torch.stack([self._statistics[name] for name in names]) / self._num_batches
            means = self.accelerator.reduce(means.float(), reduction="mean").tolist()
            # `loss` itself stays the Trainer's: the sum over the pairs
            logs = {**{n: v for n, v in zip(names, means, strict=True) if not math.isnan(v)}, **logs}
            self._statistics.clear()
            self._num_batches = 0
        super().log(logs, start_time)
