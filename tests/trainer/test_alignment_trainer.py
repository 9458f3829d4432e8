"""Meta models aligned with a teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from alignment_case import META_DEPTHS, TEACHER_DEPTHS, alignment_trainer
from testing_utils import NoiseImages, assert_equal, changed, distillation_args, nac, snapshot, vit
from transformers import EvalPrediction, TrainingArguments

from m2mkd import split_into_stages
from m2mkd.distillation.losses import boundary_loss
from m2mkd.errors import DataError, StageError
from m2mkd.trainer.alignment_trainer import AlignmentTrainer


class TestAlignmentTrainer:
    def test_the_loss_is_the_sum_of_every_stages_error_on_the_teachers_own_boundaries(self, tmp_path: Path) -> None:
        trainer, meta, teacher = alignment_trainer(tmp_path)
        pixel_values = torch.rand(3, 3, 8, 8)
        expected, hidden = torch.tensor(0.0), pixel_values
        for own, theirs in zip(
            split_into_stages(meta, META_DEPTHS), split_into_stages(teacher, TEACHER_DEPTHS), strict=True
        ):
            target = theirs(hidden)
            expected = expected + boundary_loss(own(hidden), target)
            hidden = target
        loss = trainer.compute_loss(trainer.model, {"pixel_values": pixel_values, "labels": torch.zeros(3).long()})
        torch.testing.assert_close(loss, expected)

    def test_every_layer_is_trained_and_nothing_else(self, tmp_path: Path) -> None:
        trainer, meta, teacher = alignment_trainer(tmp_path)
        before, untouched = snapshot(meta), snapshot(teacher)
        trainer.train()
        layers = {name for name in before if ".layers." in name}
        # a bias of the keys shifts all scores of a query alike: its gradient is round-off
        assert layers - changed(meta, before) <= {
            name for name in layers if name.endswith(("key.bias", "k_proj.bias"))
        }
        assert changed(meta, before) <= layers
        assert_equal(teacher.state_dict(), untouched)

    def test_training_brings_the_boundaries_together(self, tmp_path: Path) -> None:
        trainer, *_ = alignment_trainer(tmp_path, max_steps=40, optim="adamw_torch", learning_rate=1e-2)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.5 * losses[0]
        assert {"pair_0_loss", "pair_1_loss", "pair_2_loss"} <= trainer.state.log_history[0].keys()

    def test_its_evaluation_has_the_errors_of_the_stages_and_metrics_of_the_whole_meta_model(
        self, tmp_path: Path
    ) -> None:
        seen = []

        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            seen.append(found)
            return {"accuracy": 0.25}

        trainer, meta, _ = alignment_trainer(tmp_path, compute_metrics=compute_metrics)
        images = NoiseImages()
        metrics = trainer.evaluate(images)
        assert metrics["eval_accuracy"] == 0.25
        assert metrics["eval_loss"] == pytest.approx(
            sum(metrics[f"eval_pair_{index}_boundary_error"] for index in range(3))
        )
        with torch.no_grad():
            logits = meta(torch.stack([images[index]["pixel_values"] for index in range(len(images))])).logits
        np.testing.assert_allclose(seen[0].predictions, logits.numpy(), atol=1e-5)

    def test_labels_are_not_needed(self, tmp_path: Path) -> None:
        trainer, *_ = alignment_trainer(tmp_path)
        trainer.compute_loss(trainer.model, {"pixel_values": torch.rand(3, 3, 8, 8)})
        with pytest.raises(DataError, match="The batches have images, but not pixel_values"):
            trainer.compute_loss(trainer.model, {"images": torch.rand(3, 3, 8, 8)})

    def test_what_cannot_be_aligned_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="of type TrainingArguments, but this trainer needs an `M2MKDConfig`"):
            AlignmentTrainer(vit(), TrainingArguments(str(tmp_path)), teacher=vit())
        settings = {"student_depths": [1, 1, 1], "meta_depths": [1, 1, 1]}
        with pytest.raises(StageError, match="alignment uses neither labels nor stitches. Set `alpha=0`"):
            AlignmentTrainer(vit(), distillation_args(tmp_path, **settings), teacher=vit())
        settings = {"student_depths": [4], "teacher_depths": None, "meta_depths": [3]}
        args = distillation_args(tmp_path, **settings, stitch="none", alpha=0.0)
        with pytest.raises(StageError, match="A NACForImageClassification cannot be aligned"):
            AlignmentTrainer(nac(), args, teacher=vit())
