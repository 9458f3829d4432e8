import multiprocessing
import tempfile

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from transformers import EvalPrediction

from m2mkd.data import Accuracy, PerClassAccuracy, TopKAccuracy, compute_metrics
from m2mkd.data.metrics import effective_robustness, rank_classes


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
        with pytest.raises(ValueError, match=f"k={k} must be between 1 and the number of ranked classes, 12"):
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

    def test_per_class(self):
        metric = PerClassAccuracy()
        for part in (slice(0, 3), slice(3, None)):
            metric.add_batch(predictions=[0, 1, 1, 3, 0][part], references=[0, 0, 1, 3, 3][part])
        assert metric.compute(num_classes=5) == {"accuracy": [0.5, 1.0, None, 0.5, None], "n": [2, 1, 0, 2, 0]}


class TestEffectiveRobustness:
    def test_zero_on_the_line(self):
        def beta(iid):
            return 1 / (1 + np.exp(-(0.9 * np.log(iid / (1 - iid)) - 1.3)))

        baselines = [(iid, beta(iid)) for iid in (0.4, 0.6, 0.8)]
        assert effective_robustness(beta(0.7), 0.7, baselines) == pytest.approx(0)
        assert effective_robustness(beta(0.7) + 0.05, 0.7, baselines) == pytest.approx(0.05)

    def test_least_squares(self):
        iid, ood = np.array([0.5, 0.6, 0.7, 0.75]), np.array([0.2, 0.18, 0.31, 0.3])
        slope, shift = np.polyfit(np.log(iid / (1 - iid)), np.log(ood / (1 - ood)), 1)
        expected = 1 / (1 + np.exp(-(slope * np.log(0.65 / 0.35) + shift)))
        assert effective_robustness(0.3, 0.65, list(zip(iid, ood, strict=True))) == pytest.approx(0.3 - expected)

    def test_one_baseline_has_slope_one(self):
        assert effective_robustness(0.2, 0.6, [(0.6, 0.2)]) == pytest.approx(0)
        odds = 0.7 / 0.3 * (0.2 / 0.8) / (0.6 / 0.4)
        assert effective_robustness(0.3, 0.7, [(0.6, 0.2)]) == pytest.approx(0.3 - odds / (1 + odds))

    @pytest.mark.parametrize(("ood", "iid", "baselines"), [(0.2, 0.6, []), (0.0, 0.6, [(0.5, 0.1)])])
    def test_refuses(self, ood, iid, baselines):
        with pytest.raises(ValueError, match="effective robustness needs"):
            effective_robustness(ood, iid, baselines)
