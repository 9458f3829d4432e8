"""Accuracy as `evaluate` metrics that need no network, for `Trainer(compute_metrics=…)`."""

import math
import tempfile
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from m2mkd.errors import DataError


RANKED_AT_ONCE = 4096  # rows; bounds the memory of the sort


class _InMemoryMetric(evaluate.Metric):
    """A metric that writes no files, so that processes that evaluate at the same time do not share a cache folder."""

    prediction: ClassVar[Any] = datasets.Value("int64")
    form: ClassVar[str | None] = "numpy"

    def __init__(self) -> None:
        # The constructor creates a cache folder that a metric in memory never uses; delete it at once.
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder)

    def _info(self) -> evaluate.MetricInfo:
        description, _, inputs = self.__doc__.partition("\n\n")
        features = datasets.Features({"predictions": self.prediction, "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=description, citation="", inputs_description=inputs, features=features, format=self.form
        )


class Accuracy(_InMemoryMetric):
    """Fraction of the predicted classes that are correct.

    `Accuracy().compute(predictions=…, references=…)` takes integers (n,) twice and returns `{"accuracy": float}` in
    [0, 1]. `add_batch` works as for every metric of `evaluate`.
    """

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(predictions == references))}


class TopKAccuracy(_InMemoryMetric):
    """Fraction of the samples whose class is among the k best predictions.

    `TopKAccuracy().compute(predictions=…, references=…, k=5)` takes the classes that the model ranks best, best first,
    integers (n, K) with K >= k (see `rank_classes`), and integers (n,); it returns `{"top5_accuracy": float}` in
    [0, 1]. It takes ranked classes instead of scores because `evaluate` makes a Python object of every number it gets.

    Raises:
        ValueError: from `compute`, if k is not in 1..K.
    """

    prediction, form = datasets.Sequence(datasets.Value("int64")), None  # numpy is only for plain values

    def _compute(self, predictions: list[list[int]], references: list[int], k: int = 5) -> dict[str, float]:
        ranked = np.asarray(predictions)
        if not 1 <= k <= ranked.shape[1]:
            raise ValueError(f"k={k} must be between 1 and the number of ranked classes, {ranked.shape[1]}")
        right = (ranked[:, :k] == np.asarray(references)[:, None]).any(axis=1)
        return {f"top{k}_accuracy": float(right.mean())}


class PerClassAccuracy(_InMemoryMetric):
    """Accuracy of each class.

    `PerClassAccuracy().compute(predictions=…, references=…, num_classes=C)` takes integers (n,) twice and returns
    `{"accuracy": [float or None] * C, "n": [int] * C}`; a class without samples has `None`.
    """

    def _compute(
        self, predictions: np.ndarray, references: np.ndarray, num_classes: int
    ) -> dict[str, list[float | None] | list[int]]:
        counts = np.bincount(references, minlength=num_classes)
        right = np.bincount(references[predictions == references], minlength=num_classes)
        return {
            "accuracy": [int(r) / int(n) if n else None for r, n in zip(right, counts, strict=True)],
            "n": counts.tolist(),
        }


def effective_robustness(ood_accuracy: float, iid_accuracy: float, baselines: Sequence[tuple[float, float]]) -> float:
    """Effective robustness: the OOD accuracy of a model above what the baselines predict from its IID accuracy.

    `rho = ood - beta(iid)` (Taori et al., arXiv 2007.00644), where beta is a straight line that is fitted to the
    baselines by least squares, with both accuracies on a logit scale. With a single baseline its slope is 1.

    Args:
        ood_accuracy, iid_accuracy: accuracies of the model, in (0, 1).
        baselines: (IID, OOD) accuracies of other models, in (0, 1).

    Raises:
        DataError: no baselines, or an accuracy that is not inside (0, 1).
    """
    values = [ood_accuracy, iid_accuracy, *(value for pair in baselines for value in pair)]
    if not baselines or not all(0 < value < 1 for value in values):
        raise DataError(
            f"effective robustness needs at least one baseline, and accuracies between 0 and 1 (both excluded), not "
            f"{len(baselines)} baselines and accuracies {values}"
        )
    iid, ood = (np.array([_logit(pair[side]) for pair in baselines]) for side in (0, 1))
    spread = float(((iid - iid.mean()) ** 2).sum())
    slope = float(((iid - iid.mean()) * (ood - ood.mean())).sum()) / spread if spread else 1.0
    expected = ood.mean() + slope * (_logit(iid_accuracy) - iid.mean())
    return ood_accuracy - 1 / (1 + math.exp(-expected))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def rank_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """The k classes with the largest logits, best first. Ties go to the lower class, as in `argmax`.

    Args:
        logits: floats (n, C).
        k: number of classes, at most C.

    Returns:
        int64 (n, k). A row with NaN is all -1, which is not a class, so a diverged model is never right by chance.
    """
    chunks = [logits[start : start + RANKED_AT_ONCE] for start in range(0, len(logits), RANKED_AT_ONCE)]
    ranked = np.concatenate([np.argsort(-chunk, axis=1, kind="stable")[:, :k] for chunk in chunks])
    ranked[np.isnan(logits).any(axis=1)] = -1
    return ranked


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy` and `top5_accuracy` in [0, 1] of a whole evaluation set, for `Trainer(compute_metrics=…)`.

    With fewer than 5 classes `top5_accuracy` counts all of them. A row with NaN counts as wrong.

    Args:
        eval_prediction: logits (n, C), or a tuple that starts with the logits, and integer labels (n,).

    Raises:
        ValueError: no samples, or logits and labels that are not (n, C) and (n,).
    """
    predictions = eval_prediction.predictions
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    labels = np.asarray(eval_prediction.label_ids)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(
            f"logits of shape {logits.shape} and labels of shape {labels.shape}: accuracy needs the shapes "
            "(samples, classes) and (samples,), with at least one sample"
        )
    return accuracies(rank_classes(logits, min(5, logits.shape[1])), labels)


def accuracies(ranked: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` and `top5_accuracy` of ranked classes (n, k), best first, where k is 5 or, if smaller, C."""
    k = ranked.shape[1]
    top_k = TopKAccuracy().compute(predictions=ranked, references=labels, k=k)
    return {
        "accuracy": Accuracy().compute(predictions=ranked[:, 0], references=labels)["accuracy"],
        "top5_accuracy": top_k[f"top{k}_accuracy"],
    }
