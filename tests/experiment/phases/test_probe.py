"""Teachers with another head or without one, and teachers that only teach as a whole, in a run and in its plan."""

import json
from pathlib import Path

import pytest
import torch
from testing_utils import randomized
from tiny_run import published, tiny_recipe
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from m2mkd.conversion.official_pixels import DINOV2_PIXELS
from m2mkd.distillation.load import load_with_new_head
from m2mkd.errors import RecipeError, StageError
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import load_recipe
from m2mkd.experiment.runner import run


SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 4,
}
DIGITS = {"source": "uci_digits", "split": None}
DISTILL = {"data": "train", "context": "teacher", "match": "boundary", "training": {"alpha": 1.0}}


def backbone() -> PreTrainedModel:
    return randomized(DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=1)), seed=1)


def probed(folder: Path, model: PreTrainedModel) -> Recipe:
    teacher = {"pretrained": str(published(folder / "backbone", model)), "probe": True, "depths": [2, 1]}
    return tiny_recipe(folder, teacher={**teacher, "data": "train"}, meta=None, distill=DISTILL, arms=["m2mkd_kd"])


def test_a_backbone_gets_a_head_that_is_counted_reported_and_planned(tmp_path: Path) -> None:
    recipe = probed(tmp_path, backbone())
    run(recipe)
    teacher = json.loads((tmp_path / "run/report.json").read_text())["teacher"]
    # noise on one of three colours is separable
    assert teacher["iid"]["accuracy"] == 1.0
    assert (teacher["images"], teacher["labels"]) == (24, 24)
    (planned,) = make_plan(recipe).parts["teacher"]
    assert planned.name == "teacher: linear probe" and planned.parameters == 3 * 12 + 3
    fits = json.loads((tmp_path / "run/teacher/train_results.json").read_text())["probe"]["flops"]
    assert teacher["train_flops"] == pytest.approx(planned.flops + fits)
    assert "only its linear head was fitted in this run" in (tmp_path / "run/report.md").read_text()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "run/teacher")
    assert torch.equal(saved.dinov3_vit.embeddings.cls_token, backbone().embeddings.cls_token)


def test_a_backbone_takes_images_of_another_size_but_of_its_own_normalization(tmp_path: Path) -> None:
    model = randomized(ViTForImageClassification(ViTConfig(**{**SIZES, "image_size": 16}, num_labels=7)), seed=1)
    recipe = probed(tmp_path, model)
    processor = AutoImageProcessor.from_pretrained(recipe.teacher.pretrained)
    processor.size = {"height": 16, "width": 16}
    processor.save_pretrained(recipe.teacher.pretrained)
    run(recipe)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "run/teacher")
    assert saved.config.image_size == 8 and saved.vit.embeddings.position_embeddings.shape == (1, 5, 12)
    processor.image_mean = [0.1, 0.1, 0.1]
    processor.save_pretrained(recipe.teacher.pretrained)
    with pytest.raises(StageError, match="differ in `image_mean`"):
        make_plan(recipe)


def test_the_recipe_with_dinov2_plans(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    config = Dinov2Config(**sizes, image_size=518, use_mask_token=False)
    config.save_pretrained(tmp_path)
    DINOV2_PIXELS.processor(config).save_pretrained(tmp_path)
    path = Path(__file__).parents[3] / "recipes/dinov2_small.yaml"
    # digits that are read faster
    digits = {f"data.{name}.{key}": value for name in ("train", "iid") for key, value in DIGITS.items()}
    plan = make_plan(load_recipe(path, {"teacher.pretrained": str(tmp_path), **digits}))
    (probe,) = plan.parts["teacher"]
    # class token and mean of the patches; 4x4 patches and the token, weights and attention of 12 layers
    assert probe.parameters == 10 * 2 * 384 + 10
    per_image = 17 * 12 * 2 * 12 * 384**2 + 12 * 4 * 17**2 * 384 + 16 * 2 * 588 * 384 + 2 * 768 * 10
    assert probe.flops == pytest.approx(1797 * per_image, rel=1e-3)
    assert plan.totals["m2mkd_kd"] > 0


def test_a_probe_needs_data(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`data` is missing"):
        tiny_recipe(tmp_path, teacher={"pretrained": "x", "probe": True, "depths": [2, 1]})


def test_what_cannot_be_cut_teaches_as_a_whole(tmp_path: Path) -> None:
    names = {"id2label": {0: "blue", 1: "green", 2: "red"}, "label2id": {"blue": 0, "green": 1, "red": 2}}
    sizes = {"hidden_sizes": [4, 4], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    model = ConvNextForImageClassification(ConvNextConfig(**sizes, **names))
    source = str(published(tmp_path / "convnext", model))
    recipe = tiny_recipe(tmp_path, teacher={"pretrained": source}, meta=None, arms=["kd"])
    run(recipe)
    assert make_plan(recipe).totals["kd"] > 0
    assert json.loads((tmp_path / "run/report.json").read_text())["arms"]["kd"]["iid"]["n"] == 9
    with pytest.raises(RecipeError, match="`teacher.depths` is missing"):
        tiny_recipe(tmp_path, teacher={"pretrained": source}, meta=None, distill=DISTILL, arms=["m2mkd_kd"])
    uncut = {"pretrained": source, "depths": [1, 1]}
    with pytest.raises(StageError, match="ConvNextForImageClassification cannot be cut.*SigLIP"):
        run(tiny_recipe(tmp_path, teacher=uncut, meta=None, distill=DISTILL, arms=["m2mkd_kd"]))


class TestLoadWithNewHead:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
            lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
            lambda: ViTForImageClassification(ViTConfig(**SIZES, num_labels=7)),
        ],
        ids=["clip", "siglip", "other classes"],
    )
    def test_all_but_the_head_is_the_backbones(self, make, tmp_path: Path) -> None:
        source = randomized(make(), seed=3)
        source.save_pretrained(tmp_path)
        model = load_with_new_head(tmp_path, ["ant", "bee"])
        assert model.config.num_labels == 2 and model.config.id2label == {0: "ant", 1: "bee"}
        theirs, own = source.base_model.state_dict(), model.state_dict()
        kept = [name for name in own if not name.startswith("classifier.")]
        for name in kept:
            inner = name.removeprefix("vision_model.").removeprefix("vit.")
            assert torch.equal(own[name], theirs[inner])

    def test_other_missing_weights_are_refused(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        backbone().save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights.pop("norm.weight")
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(StageError, match=r"no weights for dinov3_vit.norm.weight"):
            load_with_new_head(tmp_path, ["ant", "bee"])
