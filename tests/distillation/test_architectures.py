"""The declared architectures: each is a chain of stages, a source of a meta model, and fits images of another size."""

import pytest
import torch
from testing_utils import IMAGE_SIZE, NUM_LABELS, NoiseImages, images, randomized, run_chain, vmoe
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    CLIPConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipConfig,
    TimmWrapperConfig,
)

from m2mkd import M2MKDConfig, M2MKDTrainer, meta_from_teacher, split_into_stages
from m2mkd.distillation.checks import num_tokens
from m2mkd.distillation.load import load_network
from m2mkd.distillation.meta_from_teacher import fit_image_size


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
}


def dinov3(**options) -> PreTrainedConfig:
    return DINOv3ViTConfig(**SIZES, num_labels=NUM_LABELS, **options)


def beit(**options) -> PreTrainedConfig:
    return BeitConfig(**SIZES, num_labels=NUM_LABELS, **options)


def tower(config_class: type) -> PreTrainedConfig:
    return config_class(vision_config=SIZES, num_labels=NUM_LABELS)


def timm_vit(architecture: str = "vit_tiny_patch16_224", **options) -> PreTrainedConfig:
    pytest.importorskip("timm")
    sizes = {"img_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 4}
    return TimmWrapperConfig(architecture=architecture, model_args={**sizes, **options}, num_labels=NUM_LABELS)


CONFIGS = {
    "dinov3": lambda: dinov3(num_register_tokens=2),
    "dinov3_gated": lambda: dinov3(use_gated_mlp=True),
    "beit": lambda: beit(use_relative_position_bias=True, use_mean_pooling=True),
    "beit_shared": lambda: beit(use_shared_relative_position_bias=True, use_mean_pooling=False),
    "beit_absolute": lambda: beit(use_absolute_position_embeddings=True),
    "clip": lambda: tower(CLIPConfig),
    "siglip": lambda: tower(SiglipConfig),
    "timm": timm_vit,
    "timm_pooled": lambda: timm_vit(global_pool="avg", class_token=False, reg_tokens=2, pre_norm=True),
    "timm_distilled": lambda: timm_vit("deit_tiny_distilled_patch16_224"),
}


@pytest.fixture(params=CONFIGS)
def model(request) -> PreTrainedModel:
    return randomized(AutoModelForImageClassification.from_config(CONFIGS[request.param]()), seed=1)


def test_the_stages_in_order_give_the_logits_of_the_model(model: PreTrainedModel) -> None:
    for depths in ([4], [1, 3], [1, 1, 1, 1]):
        assert torch.equal(run_chain(split_into_stages(model, depths), images()), model(images()).logits)
    first = split_into_stages(model, [1, 3])[0](images())
    assert first.shape == (3, num_tokens(model.config), 16)


def test_the_stages_have_the_tensors_of_the_model(model: PreTrainedModel) -> None:
    names = [name for stage in split_into_stages(model, [1, 2, 1]) for name in stage.state_dict()]
    assert set(names) == set(model.state_dict())
    # only the bias of all layers of a BEiT is read in every stage
    assert not [name for name in set(names) if names.count(name) > 1 and "shared_position_bias" not in name]


def test_a_meta_model_of_all_layers_is_the_teacher(model: PreTrainedModel) -> None:
    assert torch.equal(meta_from_teacher(model, [3, 1], [3, 1]).eval()(images()).logits, model(images()).logits)
    assert len(split_into_stages(meta_from_teacher(model, [3, 1], [1, 1]), [1, 1])) == 2


def test_another_image_size_gives_the_interpolation_of_the_library_and_can_be_saved(
    model: PreTrainedModel, tmp_path
) -> None:
    larger = images(size=16)
    interpolates = type(model).__name__ in ("CLIPForImageClassification", "SiglipForImageClassification")
    expected = None
    if not type(model).__name__.startswith("Timm"):  # timm resamples its positions only when it is resized
        expected = model(larger, **({"interpolate_pos_encoding": True} if interpolates else {})).logits
    fit_image_size(model, 16)
    resized = model(larger).logits
    if expected is not None:
        torch.testing.assert_close(resized, expected)
    assert torch.equal(run_chain(split_into_stages(model, [2, 2]), larger), resized)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_network(tmp_path).eval()(larger).logits, resized)


def test_pairs_learn_the_boundaries_of_the_teacher(model: PreTrainedModel, tmp_path) -> None:
    args = M2MKDConfig(
        output_dir=str(tmp_path),
        student_depths=[2, 2],
        teacher_depths=[1, 3],
        context="teacher",
        match="boundary",
        alpha=1.0,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    student = vmoe()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    M2MKDTrainer(model=student, args=args, teacher=model, train_dataset=NoiseImages()).train()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {"vmoe.layers.0.layernorm_before.weight", "vmoe.layers.3.layernorm_before.weight"} <= moved


def test_a_published_backbone_fills_the_classifier(tmp_path) -> None:
    backbone = randomized(DINOv3ViTModel(dinov3()), seed=2)
    backbone.save_pretrained(tmp_path)
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(model.eval().dinov3_vit(images()).pooler_output, backbone(images()).pooler_output)


def test_what_cannot_be_cut_is_one_stage() -> None:
    model = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])).eval()
    (stage,) = split_into_stages(model, [1])
    assert torch.equal(stage(images(size=32)), model(images(size=32)).logits)
