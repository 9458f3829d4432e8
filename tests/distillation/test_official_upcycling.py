"""The initialization of google-research/vmoe from a ViT and from a V-MoE, on the cases in `official/`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from testing_utils import assert_equal
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from m2mkd import VMoEConfig, VMoEForImageClassification
from m2mkd.conversion.jax_tree import converted_tree
from m2mkd.conversion.vmoe_jax import VMOE_JAX_TABLE
from m2mkd.distillation.upcycling import resample_positions, upcycle_into


FOLDER = Path(__file__).parent / "official"
# A ViT has other names than a V-MoE; released files count the parts of a layer over all classes.
VIT_NAMES = {
    r"Transformer/": "Encoder/",
    r"MultiHeadDotProductAttention_\d": "SelfAttention",
    r"MlpBlock_\d": "Mlp",
    r"LayerNorm_2": "LayerNorm_1",
}


def read(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and all arrays of a case."""
    arrays = {**load_file(FOLDER / case / "inputs.safetensors"), **load_file(FOLDER / case / "outputs.safetensors")}
    return json.loads((FOLDER / case / "config.json").read_text()), arrays


def tree(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The parameters under `prefix`, with our names and layouts. Our V-MoE has no `pre_logits`."""
    found = {}
    for name, array in arrays.items():
        if name.startswith(prefix) and "pre_logits" not in name:
            for theirs, ours in VIT_NAMES.items():
                name = re.sub(theirs, ours, name)
            found[name.removeprefix(prefix).removeprefix("params/")] = array
    return converted_tree(found, VMOE_JAX_TABLE)


def vmoe_of(model: dict[str, Any], image_size: int) -> VMoEForImageClassification:
    encoder, moe = model["encoder"], model["encoder"]["moe"]
    config = VMoEConfig(
        hidden_size=model["hidden_size"],
        num_hidden_layers=encoder["num_layers"],
        num_attention_heads=encoder["num_heads"],
        intermediate_size=encoder["mlp_dim"],
        hidden_act="gelu_pytorch_tanh",
        image_size=image_size,
        patch_size=model["patch_size"],
        moe_layers=moe["layers"],
        num_experts=moe["num_experts"],
        num_experts_per_tok=moe["router"]["num_selected_experts"],
        norm_topk_prob=False,
        num_labels=model["num_classes"],
        router_bias=False,
    )
    return VMoEForImageClassification(config).eval()


def source_of(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The ViT that a case starts from, as transformers has it, or the V-MoE."""
    if "source_model" in config:
        model = vmoe_of(config["source_model"], config["source_images"][1])
    else:
        vit = config["source_vit"]
        fields = {
            "hidden_size": vit["hidden"],
            "num_hidden_layers": vit["layers"],
            "num_attention_heads": vit["heads"],
            "intermediate_size": vit["mlp"],
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "image_size": vit["image"],
            "patch_size": vit["patch"],
            "num_labels": vit["classes"],
        }
        model = ViTForImageClassification(ViTConfig(**fields))
        weights = {name.replace("vmoe.", "vit."): tensor for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.mark.parametrize(
    ("case", "tokens_are_dropped"),
    [
        ("init_from_vit_resize", False),
        ("init_from_vit_same_size_all_moe", False),
        ("init_from_vmoe_finetune", True),
    ],
)
def test_every_tensor_and_the_logits_are_those_of_the_official_initialization(
    case: str, tokens_are_dropped: bool
) -> None:
    config, arrays = read(case)
    source = source_of(config, tree(arrays, "source/"))
    student = vmoe_of(config["model"], config["images"][1])
    student.load_state_dict(tree(arrays, "target_before/"), strict=True)
    upcycle_into(student, source, keep_head=True, zoom_positions=True)
    assert_equal(student.state_dict(), tree(arrays, "target_after/"))
    if not tokens_are_dropped:
        expected = arrays["logits_after"]
        ours = student(arrays["images"].permute(0, 3, 1, 2)).logits
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("case", "index"),
    [
        *(("posemb_zoom", index) for index in (0, 1, 2, 3, 7)),
        ("posemb_zoom_edge_zero", 0),
        ("posemb_zoom_edge_zero", 2),
    ],
)
def test_position_embeddings_with_a_class_token(case: str, index: int) -> None:
    _, arrays = read(case)
    source, resized = arrays[f"{index}/source"], arrays[f"{index}/resized"]
    old, new = (round((positions.shape[1] - 1) ** 0.5) for positions in (source, resized))
    assert torch.equal(resample_positions(source, (old, old), (new, new)), resized)
