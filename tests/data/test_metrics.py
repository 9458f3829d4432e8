import multiprocessing
import tempfile

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from transformers import EvalPrediction

from m2mkd.data import Accuracy, TopKAccuracy, compute_metrics
from m2mkd.data.metrics import rank_classes


RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5000, 12)).astype(np.float32)
LABELS = RNG.integers(0, 12, 5000)


def evaluate_often(results):
    prediction = EvalPrediction(np.eye(6), np.arange(6))
    results.put({compute_metrics(prediction)["accuracy"] for _ in range(20)})


class TestComputeMetrics:
    def test_against_sklearn(self):
        assert compute_metrics(EvalPrediction(LOGITS, LABELS)) == {
            "accuracy": accuracy_score(LABELS, LOGITS.argmax(1)),
            "top5_accuracy": top_k_accuracy_score(LABELS, LOGITS, k=5, labels=range(12)),
        }

    def test_few_classes(self):
        result = compute_metrics(EvalPrediction(LOGITS[:, :3], LABELS % 3))
        assert result["top5_accuracy"] == 1.0 and 0.2 < result["accuracy"] < 0.5

    def test_further_model_outputs(self):
        assert compute_metrics(EvalPrediction((LOGITS, None), LABELS)) == compute_metrics(
            EvalPrediction(LOGITS, LABELS)
        )

    def test_a_model_that_diverged_is_never_right(self):
        result = compute_metrics(EvalPrediction(np.full((10, 5), np.nan), np.zeros(10, dtype=int)))
        assert result == {"accuracy": 0.0, "top5_accuracy": 0.0}

    @pytest.mark.parametrize("shapes", [((0, 3), (0,)), ((4,), (4,)), ((4, 3), (5,)), ((4, 3, 2), (4,))])
    def test_shapes(self, shapes):
        with pytest.raises(ValueError, match="logits of shape"):
            compute_metrics(EvalPrediction(np.zeros(shapes[0]), np.zeros(shapes[1], dtype=int)))


class TestRankClasses:
    def test_ties_go_to_the_lower_class(self):
        assert rank_classes(np.array([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]]), 3).tolist() == [
            [1, 2, 0],
            [0, 1, 2],
        ]


class TestMetrics:
    def test_batches_and_k(self):
        metric = TopKAccuracy()
        ranked = rank_classes(LOGITS, 12)
        for part in (slice(0, 3), slice(3, 2000), slice(2000, None)):
            metric.add_batch(predictions=ranked[part], references=LABELS[part])
        expected = top_k_accuracy_score(LABELS, LOGITS, k=3, labels=range(12))
        assert metric.compute(k=3) == {"top3_accuracy": expected}

    @pytest.mark.parametrize("k", [0, 13])
    def test_k_outside(self, k):
        with pytest.raises(ValueError, match=f"k={k} with 12 ranked classes"):
            TopKAccuracy().compute(predictions=rank_classes(LOGITS, 12), references=LABELS, k=k)

    def test_accuracy_is_reusable(self):
        metric = Accuracy()
        assert metric.compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}
        assert metric.compute(predictions=[2], references=[2]) == {"accuracy": 1.0}

    def test_two_processes_at_once_leave_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        processes = [context.Process(target=evaluate_often, args=(results,)) for _ in range(2)]
        for process in processes:
            process.start()
        assert [results.get() for _ in processes] == [{1.0}, {1.0}]
        for process in processes:
            process.join()
        assert list(tmp_path.iterdir()) == []
