"""Meta models aligned with a teacher, and the warning about those that are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from testing_utils import NoiseImages, assert_equal, changed, distillation_args, nac, run_chain, snapshot, vit
from tiny_run import published, recipe_content, write_images
from torch import nn
from transformers import AutoModelForImageClassification, EvalPrediction, TrainingArguments

from m2mkd import split_into_stages
from m2mkd.distillation.losses import boundary_loss
from m2mkd.distillation.meta_from_teacher import meta_from_teacher
from m2mkd.errors import DataError, RecipeError, RunError, StageError
from m2mkd.evaluation.hybrids import check_teacher, hybrid_accuracies, judge_hybrids
from m2mkd.experiment import runner
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.trainer.alignment_trainer import AlignmentTrainer


TEACHER_DEPTHS, META_DEPTHS = [2, 2, 2], [1, 1, 1]


def alignment_trainer(
    folder: Path, compute_metrics: Any = None, **overrides: Any
) -> tuple[AlignmentTrainer, Any, Any]:
    teacher = vit(seed=2, num_hidden_layers=6)
    meta = meta_from_teacher(teacher, TEACHER_DEPTHS, META_DEPTHS)
    settings = {"student_depths": META_DEPTHS, "teacher_depths": None, "meta_depths": TEACHER_DEPTHS}
    args = distillation_args(folder, **settings, stitch="none", alpha=0.0, **overrides)
    given = {"train_dataset": NoiseImages(), "compute_metrics": compute_metrics}
    return AlignmentTrainer(meta, args, teacher=teacher, **given), meta, teacher


class TestBoundaryLoss:
    def test_it_is_zero_for_equals_and_one_for_the_mean(self) -> None:
        target = torch.randn(4, 5, 6) * 3 + 2
        assert boundary_loss(target, target) == 0
        mean = target.mean(dim=(0, 1)).expand_as(target)
        torch.testing.assert_close(boundary_loss(mean, target), torch.tensor(1.0))

    def test_logits_are_a_boundary_too_and_the_target_gets_no_gradient(self) -> None:
        states, target = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
        boundary_loss(states, target).backward()
        assert states.grad is not None and target.grad is None

    def test_scale_does_not_matter(self) -> None:
        states, target = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
        torch.testing.assert_close(boundary_loss(7 * states, 7 * target), boundary_loss(states, target))


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
        assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_pair_{index}_loss"] for index in range(3)))
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


class TestHybridAccuracies:
    def test_they_are_those_of_the_composed_networks(self) -> None:
        teacher, meta = vit(seed=2, num_hidden_layers=6), vit(seed=1)
        theirs, own = split_into_stages(teacher, TEACHER_DEPTHS), split_into_stages(meta, META_DEPTHS)
        images = NoiseImages()
        found = hybrid_accuracies(own, theirs, [0, 2], images, batch_size=3, use_cpu=True)
        batch = [images[index] for index in range(len(images))]
        pixel_values = torch.stack([item["pixel_values"] for item in batch])
        labels = torch.tensor([int(item["labels"]) for item in batch])

        def accuracy(chain: list[Any]) -> float:
            with torch.no_grad():
                return (run_chain(chain, pixel_values).argmax(dim=-1) == labels).float().mean().item()

        assert found["hybrids"] == pytest.approx(
            {"0": accuracy([theirs[0], *own[1:]]), "2": accuracy([*own[:2], theirs[2]])}
        )
        assert found["teacher"] == pytest.approx(accuracy(theirs))
        # of the classes that the set can have only
        images.possible = np.array([1, 3])
        among = hybrid_accuracies(own, theirs, [0], images, batch_size=3, use_cpu=True)["teacher"]
        with torch.no_grad():
            logits = run_chain(theirs, pixel_values)
        chosen = torch.where(logits[:, 3] > logits[:, 1], 3, 1)
        assert among == pytest.approx((chosen == labels).float().mean().item())
        assert found["chance"] == labels.bincount().max().item() / len(labels) and found["n"] == len(images)


@pytest.mark.parametrize(
    "accuracy, teacher, n, noise, weak",
    [
        (0.1, 0.9, 1000, ["1"], []),
        (0.4, 0.9, 1000, [], ["1"]),
        (0.8, 0.9, 1000, [], []),
        (0.1, 0.11, 1000, [], []),
        # too few images to be sure
        (0.1, 0.5, 8, [], ["1"]),
    ],
)
def test_hybrids_are_judged_between_chance_and_the_teachers_own(
    accuracy: float, teacher: float, n: int, noise: list[str], weak: list[str]
) -> None:
    measured = {"hybrids": {"1": accuracy}, "teacher": teacher, "chance": 0.1, "n": n}
    assert judge_hybrids(measured) == (noise, weak)


class TestCheckTeacher:
    @staticmethod
    def measured(teacher: float, n: int) -> dict[str, Any]:
        return {"hybrids": {"0": 0.1}, "teacher": teacher, "chance": 0.1, "n": n, "set": "IID test set"}

    def test_one_that_is_no_better_than_chance_is_refused(self) -> None:
        with pytest.raises(RunError, match=r"right on 11.0 % of 1,000 images \(IID test set\), .*chance \(10.0 %\)"):
            check_teacher(self.measured(0.11, 1000))

    def test_few_images_are_a_reason_to_warn_alone(self) -> None:
        assert "too few images to be sure" in check_teacher(self.measured(0.11, 30))

    def test_a_better_one_is_let_pass(self) -> None:
        assert check_teacher(self.measured(0.2, 1000)) is None


PLAIN = {"num_train_epochs": 10, "learning_rate": 5e-3}


def from_teacher_content(folder: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe with a plainly trained teacher of four layers, good at its colours, and a meta model of it."""
    content = recipe_content(folder)
    teacher = {**content["teacher"], "depths": [2, 2], "finetuning": PLAIN}
    teacher["model"]["config"]["num_hidden_layers"] = 4
    meta = {"init": "from_teacher", "data": "train", "training": PLAIN}
    write_images(folder / "test", per_class=30, seed=1)
    own = {"arms": ["m2mkd"], "teacher": teacher, "meta": meta}
    return {**content, **own, **changes}


def teacher_sizes(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**from_teacher_content(folder)["teacher"]["model"]["config"], **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    runner.run(parse_recipe(from_teacher_content(folder), "from_teacher"))
    return folder


class TestRecipe:
    def test_the_report_has_the_hybrids_before_and_after(
        self, finished: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = json.loads((finished / "run" / "report.json").read_text())
        stages = report["hybrids"]["stages"]
        assert stages.keys() == {"0", "1"} and report["hybrids"]["n"] == 90
        own = report["hybrids"]["teacher"]
        assert own == report["teacher"]["iid"]["accuracy"] and own > 0.8
        for accuracies in stages.values():
            assert accuracies["before"] is not None and accuracies["after"] >= own - 0.1
        assert report["meta"]["labels"] == 0 and report["meta"]["iid"]["accuracy"] > 0.6
        assert "## Teacher stages inside the meta model" in (finished / "run" / "report.md").read_text()
        runner.make_report(parse_recipe(from_teacher_content(finished), "again"))
        assert "Teacher stages inside the meta model" in capsys.readouterr().out

    def test_the_meta_model_is_half_the_teacher(self, finished: Path) -> None:
        meta = AutoModelForImageClassification.from_pretrained(finished / "run" / "meta")
        assert meta.config.num_hidden_layers == 2 and meta.config.id2label[0] == "blue"

    def test_a_folder_with_words_of_its_own_for_the_classes_is_a_teacher(self, finished: Path, tmp_path: Path) -> None:
        model = AutoModelForImageClassification.from_pretrained(finished / "run" / "teacher")
        model.config.id2label = dict(enumerate(("navy", "lime", "crimson")))
        model.save_pretrained(tmp_path / "published")
        shutil.copy(finished / "run" / "teacher" / "preprocessor_config.json", tmp_path / "published")
        teacher = {"pretrained": str(tmp_path / "published"), "depths": [2, 2]}
        content = from_teacher_content(finished, teacher=teacher, output_dir=str(tmp_path / "run"))
        runner.run(parse_recipe(content, "published"))
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["teacher"]["train_flops"] == 0 and report["meta"]["train_flops"] > 0
        assert report["hybrids"]["stages"]["0"]["after"] > 0.7

    def test_an_unaligned_meta_model_is_warned_of_and_nothing_is_distilled(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = from_teacher_content(finished, output_dir=str(tmp_path / "run"))
        model = {"model_type": "vit", "config": {**content["teacher"]["model"]["config"], "num_hidden_layers": 2}}
        # one step at a learning rate of nothing: a meta model that knows nothing of the teacher
        untrained = {"max_steps": 1, "learning_rate": 1e-12}
        content["meta"] = {"model": model, "data": "train", "training": untrained}
        content["teacher"] = {"pretrained": str(finished / "run" / "teacher"), "depths": [2, 2]}
        with pytest.raises(RunError, match=r"the teacher's own \d+\.\d %, chance 33.3 %.*meta.init: from_teacher"):
            runner.run(parse_recipe(content, "unaligned"))
        assert "Warning: meta model and teacher do not share a feature space" in capsys.readouterr().out
        assert not (tmp_path / "run" / "pairs" / "0").exists()
        # without a teacher in the loss there is nothing to warn of
        content["distill"] = {"data": "train", "training": {"alpha": 0.0, "num_train_epochs": 1}}
        assert runner.run(parse_recipe(content, "unaligned")) is not None
        assert json.loads((tmp_path / "run" / "report.json").read_text())["hybrids"] is None

    @pytest.mark.parametrize("init", ["random", "from_teacher"])
    def test_a_teacher_at_chance_is_refused_before_anything_is_learned_from_it(
        self, finished: Path, tmp_path: Path, init: str
    ) -> None:
        content = from_teacher_content(finished, output_dir=str(tmp_path / "run"))
        write_images(tmp_path / "test", per_class=40, seed=1)
        content["data"]["iid"]["source"] = f"imagefolder:{tmp_path / 'test'}"
        teacher = AutoModelForImageClassification.from_pretrained(finished / "run" / "teacher")
        nn.init.zeros_(teacher.classifier.weight)
        content["teacher"] = {"pretrained": str(published(tmp_path / "published", teacher)), "depths": [2, 2]}
        if init == "random":
            content["meta"]["model"] = {"model_type": "vit", "config": teacher_sizes(finished, num_hidden_layers=2)}
            del content["meta"]["init"]
        with pytest.raises(RunError, match=r"Nothing can be learned from this teacher: .*33.3 % of 120 images"):
            runner.run(parse_recipe(content, "at chance"))
        assert not (tmp_path / "run" / "pairs" / "0").exists()
        assert (tmp_path / "run" / "meta").exists() == (init == "random")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"meta": {"data": "train"}}, "meta: give `model` .*or `init: from_teacher`"),
            (
                {"teacher": {"pretrained": "x", "depths": [1, 1], "incubation": {"num_train_epochs": 1}}},
                "`teacher.incubation` needs a meta model to incubate in",
            ),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            parse_recipe(from_teacher_content(tmp_path, **changes), "wrong")
