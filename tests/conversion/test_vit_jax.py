"""ViTs of big_vision and vision_transformer (JAX) become those of transformers, with the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jax_vmoe import Tree, attention, mlp, norm
from official_files import config_file, left
from transformers import AutoModelForImageClassification, ViTForImageClassification

from m2mkd.conversion.convert import convert
from m2mkd.errors import ConversionError


RELEASED = {path.parent.name: path for path in (Path(__file__).parent / "vmoe_jax").glob("*/source.npz")}


def forward(p: Tree, images: np.ndarray, modules: tuple[str, str, str], token_has_position: bool = True) -> np.ndarray:
    """`VisionTransformer` in float64; `modules` are attention, second norm and MLP of its blocks."""
    p = {name: array.astype(np.float64) for name, array in p.items()}
    size, _, channels, width = p["embedding/kernel"].shape
    rows, columns = images.shape[1] // size, images.shape[2] // size
    patches = images.reshape(len(images), rows, size, columns, size, channels)
    x = np.einsum("bipjqc,pqcd->bijd", patches, p["embedding/kernel"]) + p["embedding/bias"]
    x = x.reshape(len(images), -1, width)
    token = np.tile(p["cls"], (len(images), 1, 1))
    if token_has_position:
        x = np.concatenate([token, x], axis=1) + p["Transformer/posembed_input/pos_embedding"]
    else:
        x = np.concatenate([token, x + p["pos_embedding"]], axis=1)
    for layer in range(sum(name.endswith("LayerNorm_0/scale") for name in p)):
        block = f"Transformer/encoderblock_{layer}"
        x = x + attention(p, f"{block}/{modules[0]}", norm(p, f"{block}/LayerNorm_0", x))
        dense = [[p[f"{block}/{modules[2]}/Dense_{i}/{part}"] for i in (0, 1)] for part in ("kernel", "bias")]
        x = x + mlp(*dense, norm(p, f"{block}/{modules[1]}", x))
    return norm(p, "Transformer/encoder_norm", x)[:, 0] @ p["head/kernel"] + p["head/bias"]


LINEN = ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
BEFORE_LINEN = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")


def released(name: str) -> Tree:
    with np.load(RELEASED[name]) as arrays:
        return {name: arrays[name] for name in arrays.files}


def without_representation(arrays: Tree) -> Tree:
    return {name: array for name, array in arrays.items() if not name.startswith("pre_logits/")}


def with_big_vision_positions(arrays: Tree) -> Tree:
    positions = arrays.pop("Transformer/posembed_input/pos_embedding")
    return {**arrays, "pos_embedding": positions[:, 1:]}


def converted(folder: Path, arrays: Tree, **config: Any) -> ViTForImageClassification:
    np.savez(folder / "vit.npz", **arrays)
    convert("vit-jax", config_file(folder, config) if config else None, folder / "vit.npz", folder / "out")
    model, info = AutoModelForImageClassification.from_pretrained(folder / "out", output_loading_info=True)
    assert type(model) is ViTForImageClassification and not any(info.values()), info
    return model.eval()


def assert_logits(model: ViTForImageClassification, expected: np.ndarray, images: np.ndarray) -> None:
    with torch.no_grad():
        ours = model(torch.from_numpy(images).float().permute(0, 3, 1, 2)).logits.numpy()
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("prefix", ["", "params/", "target/"])
def test_released_names(tmp_path: Path, prefix: str) -> None:
    arrays, images = released("init_from_vit_same_size_all_moe"), np.random.default_rng(0).normal(size=(2, 12, 12, 3))
    # what trainers save as well
    others = {"opt/0/mu/embedding/kernel": arrays["embedding/kernel"], "opt/0/count": np.zeros(())} if prefix else {}
    model = converted(tmp_path, {**{f"{prefix}{name}": array for name, array in arrays.items()}, **others})
    assert_logits(model, forward(arrays, images, LINEN), images)
    assert (model.config.num_attention_heads, model.config.hidden_act) == (3, "gelu_pytorch_tanh")


def test_names_from_before_linen(tmp_path: Path) -> None:
    arrays = without_representation(released("init_from_vit_resize"))
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3))
    assert_logits(converted(tmp_path, arrays), forward(arrays, images, BEFORE_LINEN), images)


def test_in_big_vision_the_class_token_has_no_position(tmp_path: Path) -> None:
    arrays = with_big_vision_positions(released("init_from_vit_same_size_all_moe"))
    images = np.random.default_rng(2).normal(size=(2, 12, 12, 3))
    assert_logits(converted(tmp_path, arrays), forward(arrays, images, LINEN, token_has_position=False), images)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    arrays = without_representation(released("init_from_vit_resize"))
    images = np.random.default_rng(3).normal(size=(2, 8, 32, 3))
    model = converted(tmp_path, arrays, image_size=[8, 32])
    assert_logits(model, forward(arrays, images, BEFORE_LINEN), images)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"pre_logits/kernel": np.zeros((12, 12))}, {}, "a representation layer, which the ViT of transformers"),
        ({"MAPHead_0/probe": np.zeros((1, 1, 12))}, {}, "attention pooling"),
        ({"cls": None}, {}, "classifies by a class token"),
        ({"embedding/kernel": None}, {}, "one `embedding/kernel`; this one has 0"),
        ({"other/embedding/kernel": np.zeros((4, 4, 3, 12))}, {}, "one `embedding/kernel`; this one has 2"),
        ({"Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias": None}, {}, "encoderblock_1/Mlp/Dense_0/bias: missing"),
        ({"head/extra": np.zeros(3)}, {}, r"do not belong to the model: \['head/extra'\]"),
        ({}, {"patch_size": 4}, "not known: .*patch_size"),
        ({}, {"image_size": [9, 16]}, "multiple|position_embeddings|pos_embedding"),
    ],
)
def test_what_is_no_such_vit_is_refused(tmp_path: Path, change: dict, config: dict, message: str) -> None:
    arrays = {**released("init_from_vit_same_size_all_moe"), **change}
    with pytest.raises(ConversionError, match=message):
        converted(tmp_path, {name: array for name, array in arrays.items() if array is not None}, **config)
    assert left(tmp_path / "out") == []
