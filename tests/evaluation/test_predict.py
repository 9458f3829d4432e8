"""Whole data sets through a model: ranks, losses, and the classes that a set can have."""

import numpy as np
import pytest
import torch
from testing_utils import NUM_LABELS, NoiseImages, vit
from torch import nn

from m2mkd.evaluation.predict import among, evaluate_model, predict, run_over


def logits_of(model: nn.Module, images: NoiseImages) -> torch.Tensor:
    with torch.no_grad():
        return model(images.pixel_values).logits


class TestPredict:
    def test_each_image_once_whatever_the_batch_size(self) -> None:
        model, images = vit(), NoiseImages(count=7)
        found = predict(model, images, batch_size=3, use_cpu=True)
        logits = logits_of(model, images)
        assert found.ranked.tolist() == logits.argsort(dim=-1, descending=True).tolist()
        assert found.classes == NUM_LABELS and found.labels.tolist() == images.labels.tolist()
        losses = nn.functional.cross_entropy(logits, images.labels, reduction="none")
        np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
        assert found.summary() == evaluate_model(model, images, batch_size=7, use_cpu=True) | {
            "loss": pytest.approx(losses.mean().item())
        }

    def test_no_more_classes_are_ranked_than_can_be(self) -> None:
        images = NoiseImages()
        images.labels, images.possible = images.labels % 2 * 2 + 1, np.array([1, 3])
        found = predict(vit(), images, batch_size=4, use_cpu=True)
        assert found.classes == 2 and np.sort(found.ranked).tolist() == [[1, 3]] * 16
        assert found.summary()["top5_accuracy"] == 1.0

    def test_a_logit_that_is_no_number_is_never_right(self) -> None:
        model = vit()
        nn.init.constant_(model.classifier.bias, torch.nan)
        found = predict(model, NoiseImages(), batch_size=4, use_cpu=True)
        assert (found.ranked == -1).all() and found.summary()["accuracy"] == 0.0


class TestAmong:
    def test_the_others_can_never_be_the_best(self) -> None:
        logits = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.bfloat16)
        assert among(logits, np.array([1, 2])).tolist() == [[-torch.inf, 1.0, 2.0]]
        assert among(logits, None).tolist() == [[3.0, 1.0, 2.0]] and among(logits, None).dtype == torch.float32


def test_a_plain_module_is_run_over_too() -> None:
    class Means(nn.Module):
        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return labels.float().mean(), pixel_values.mean(dim=(1, 2, 3))

    images = NoiseImages(count=5)
    found = run_over(Means(), images, batch_size=2, use_cpu=True)
    np.testing.assert_allclose(found.predictions, images.pixel_values.mean(dim=(1, 2, 3)), rtol=1e-5)
    assert found.label_ids.tolist() == images.labels.tolist()
