"""A meta model that is made of the teacher, and the warning about one that does not share its feature space."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import published, recipe_content, write_images
from torch import nn
from transformers import AutoModelForImageClassification

from m2mkd.errors import RecipeError, RunError
from m2mkd.experiment import runner
from m2mkd.experiment.recipe_file import parse_recipe


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
            ({"meta": {"data": "train"}}, "meta: give either `model` .*or `init: from_teacher`"),
            (
                {"teacher": {"pretrained": "x", "depths": [1, 1], "incubation": {"num_train_epochs": 1}}},
                "`teacher.incubation` needs a meta model to incubate in",
            ),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            parse_recipe(from_teacher_content(tmp_path, **changes), "wrong")
