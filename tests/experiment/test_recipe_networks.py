"""What is checked of a recipe before anything is trained: by the runner, the plan and the miniature alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import published, recipe_content
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from m2mkd.errors import DataError, StageError
from m2mkd.experiment import runner
from m2mkd.experiment.miniature import make_miniature
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import parse_recipe


CHECKED_BY = {"run": runner.run, "plan": make_plan, "miniature": make_miniature}


@pytest.fixture(params=CHECKED_BY)
def check(request: pytest.FixtureRequest) -> Callable[[Recipe], Any]:
    return CHECKED_BY[request.param]


def with_published_teacher(
    folder: Path, teacher: Any, depths: tuple[int, ...] = (2, 1), **pixels: Any
) -> dict[str, Any]:
    source = published(folder / "published", teacher, **pixels)
    teacher = {"pretrained": str(source), "depths": list(depths)}
    return recipe_content(folder, teacher=teacher, meta={"init": "from_teacher", "data": "train"})


def config(kind: type = ViTConfig, **changes: Any) -> Any:
    sizes = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    return kind(**{**sizes, "patch_size": 4, "image_size": 8, "num_labels": 3, **changes})


class TestRecipeNetworks:
    def test_a_head_that_was_never_trained(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = with_published_teacher(tmp_path, ViTModel(config()))
        with pytest.raises(StageError, match="published is not a trained classifier.*fine-tune it"):
            check(parse_recipe(content, "headless"))

    def test_no_image_processor(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = with_published_teacher(tmp_path, ViTForImageClassification(config()))
        (tmp_path / "published" / "preprocessor_config.json").unlink()
        with pytest.raises(DataError, match="published has no image processor.*normalization are unknown"):
            check(parse_recipe(content, "no processor"))

    def test_another_image_processor(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = with_published_teacher(tmp_path, ViTForImageClassification(config()), mean=[0.1, 0.2, 0.3])
        with pytest.raises(StageError, match="data set 'train' and the teacher .*published differ in `image_mean`"):
            check(parse_recipe(content, "normalization"))

    def test_depths_that_do_not_add_up(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = with_published_teacher(tmp_path, ViTForImageClassification(config(num_hidden_layers=8)), (2, 2))
        with pytest.raises(StageError, match=r"depths \[2, 2\] add up to 4 layers, but ViT\w* has 8"):
            check(parse_recipe(content, "depths"))

    def test_another_number_of_classes(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = with_published_teacher(tmp_path, ViTForImageClassification(config(num_labels=7)))
        with pytest.raises(StageError, match="student has 3 classes and the teacher 7"):
            check(parse_recipe(content, "classes"))

    def test_images_that_patches_do_not_cover(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = with_published_teacher(tmp_path, ViTForImageClassification(config(patch_size=3, image_size=9)))
        with pytest.raises(StageError, match="Images of 8 pixels cannot be divided into the teacher's patches of 3"):
            check(parse_recipe(content, "patches"))

    def test_a_deit_in_a_meta_model_of_other_tokens(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = with_published_teacher(tmp_path, DeiTForImageClassification(config(DeiTConfig)))
        content["meta"] = recipe_content(tmp_path)["meta"]
        with pytest.raises(StageError, match=r"teacher \(a deit\) has 2 and the meta model \(a vit\) 1.*from_teacher"):
            check(parse_recipe(content, "tokens"))

    def test_networks_trained_on_other_pixels(self, tmp_path: Path, check: Callable[[Recipe], Any]) -> None:
        content = recipe_content(tmp_path)
        content["data"]["other"] = {**content["data"]["train"], "std": [0.1, 0.2, 0.3]}
        content["meta"]["data"] = "other"
        with pytest.raises(StageError, match="data set 'train' and the meta model differ in `image_std`"):
            check(parse_recipe(content, "pixels"))

    @pytest.mark.parametrize("heads", [None, ["DeiTForImageClassificationWithTeacher"]], ids=["one head", "two"])
    def test_a_deit_fits_a_student_without_its_distillation_token(self, tmp_path: Path, heads: list[str]) -> None:
        content = recipe_content(tmp_path, meta={"init": "from_teacher", "data": "train"})
        sizes = {**content["teacher"]["model"]["config"], **({"architectures": heads} if heads else {})}
        content["teacher"]["model"] = {"model_type": "deit", "config": sizes}
        names = [phase.name for phase in make_plan(parse_recipe(content, "deit")).phases]
        assert names == ["teacher", "meta", "pair 0", "pair 1", "pairs", "arm e2e", "arm kd", "arm m2mkd"]

    def test_an_arm_without_a_teacher_asks_nothing_of_it(self, tmp_path: Path) -> None:
        content = with_published_teacher(tmp_path, ViTModel(config()))
        make_plan(parse_recipe({**content, "arms": ["e2e"]}, "e2e"))

    def test_images_elsewhere_leave_a_miniature_without_a_check_of_classes_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = with_published_teacher(tmp_path, ViTForImageClassification(config(num_labels=7)))
        content["data"]["train"]["source"] = "imagefolder:/nowhere"
        make_miniature(parse_recipe(content, "elsewhere"))
        assert "The classes of the data sets are not checked: data.train" in capsys.readouterr().out
        content["teacher"]["depths"] = [1, 1]
        with pytest.raises(StageError, match=r"depths \[1, 1\] add up to 2"):
            make_miniature(parse_recipe(content, "elsewhere"))
