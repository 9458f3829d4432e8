"""Where the transformers that can be cut into stages have their parts: one declaration an architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m2mkd.distillation.dinov3_classifier import DINOv3ViTForImageClassification
from m2mkd.distillation.resize import resize_beit, resize_embedding, resize_parameter, resize_rope
from m2mkd.distillation.sizes import pair
from m2mkd.errors import StageError


@dataclass(frozen=True)
class ToVMoE:
    """
    How a V-MoE is made from the classifier: a layer's names that differ from a V-MoE's, the projection before each
    LayerScale, what of the tokens and of the head a V-MoE cannot express, and the tensors that are left out.
    """

    layer_names: tuple[tuple[str, str], ...] = ()
    layer_scales: tuple[tuple[str, str], ...] = ()
    lost_tokens: str | None = None
    lost_head: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """
    Module paths of a classifier's parts, and what its layers and its head need.

    Args:
        embeddings (`tuple[str, ...]`): Modules that turn images into hidden states, in order.
        layers (`str`): The list of transformer layers.
        norms (`tuple[str, ...]`): Modules between the last layer and the pooling.
        pool (`Callable`, *optional*): From the last hidden states to the input of each classifier. `None`: the stage's
            class knows how.
        classifiers (`tuple[str, ...]`): The heads; the logits are their mean.
        to_vmoe (`ToVMoE`, *optional*): `None`: a V-MoE cannot be made from it.
        layer_arguments (`Callable`): Further arguments of each layer, from the stage and its hidden states.
        everywhere (`tuple[str, ...]`): Modules that the layers of every stage read, if the model has them.
        unused (`tuple[str, ...]`): Modules, if the model has them, that the logits do not depend on.
        resize (`Callable`): Adapts the classifier in place to images of another size.
    """

    embeddings: tuple[str, ...]
    layers: str
    norms: tuple[str, ...]
    pool: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None
    classifiers: tuple[str, ...] = ("classifier",)
    to_vmoe: ToVMoE | None = None
    layer_arguments: Callable[[nn.Module, torch.Tensor], dict[str, Any]] = lambda stage, hidden_states: {}
    everywhere: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    resize: Callable[[PreTrainedModel, int], None] = resize_parameter


# ---- Heads: what the classifiers read ----


def _class_token(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    return (hidden_states[:, 0],)


def _class_and_distillation_token(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden_states[:, 0], hidden_states[:, 1]


def _patch_mean(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    if hidden_states.shape[1] == 1:
        raise StageError(
            "The head of the teacher reads the mean of the patches, but it got only one token. If this is the read-in "
            "of a NAC, set `read_in_latents` to 'all' (in a recipe, in `distill.training`)."
        )
    return (torch.mean(hidden_states[:, 1:, :], dim=1),)


def _class_token_and_patch_mean(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    (patches,) = _patch_mean(hidden_states)
    return (torch.cat([hidden_states[:, 0], patches], dim=1),)


def _mean(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.mean(hidden_states, dim=1),)


def _already_pooled(pooled: torch.Tensor) -> tuple[torch.Tensor]:
    return (pooled,)


# ---- Layers: what they read beside the hidden states ----


def _no_mask(stage: nn.Module, hidden_states: torch.Tensor) -> dict[str, Any]:
    return {"attention_mask": None}


def _rotary_positions(stage: nn.Module, hidden_states: torch.Tensor) -> dict[str, Any]:
    # only the size of the image is read
    image = hidden_states.new_empty((1, 1, *pair(stage.config.image_size)))
    return {"position_embeddings": stage.dinov3_vit.rope_embeddings(image)}


def _relative_positions(stage: nn.Module, hidden_states: torch.Tensor) -> dict[str, Any]:
    resolution, shared = pair(stage.config.image_size), getattr(stage.beit, "shared_position_bias", None)
    window = tuple(side // stage.config.patch_size for side in resolution)
    mask = None if shared is None else shared(window, dim_size=hidden_states.shape[1])
    return {"attention_mask": mask, "resolution": resolution}


ARCHITECTURES = {
    "ViTForImageClassification": Architecture(
        ("vit.embeddings",), "vit.layers", ("vit.layernorm",), _class_token, to_vmoe=ToVMoE()
    ),
    "DeiTForImageClassification": Architecture(
        ("deit.embeddings",),
        "deit.layers",
        ("deit.layernorm",),
        _class_token,
        to_vmoe=ToVMoE(lost_tokens="the distillation token", left_out=("deit.embeddings.distillation_token",)),
    ),
    "DeiTForImageClassificationWithTeacher": Architecture(
        ("deit.embeddings",),
        "deit.layers",
        ("deit.layernorm",),
        _class_and_distillation_token,
        ("cls_classifier", "distillation_classifier"),
        to_vmoe=ToVMoE(
            lost_tokens="the distillation token",
            lost_head="the head of the distillation token",
            left_out=("deit.embeddings.distillation_token", "distillation_classifier"),
        ),
    ),
    "Dinov2ForImageClassification": Architecture(
        ("dinov2.embeddings",),
        "dinov2.encoder.layer",
        ("dinov2.layernorm",),
        _class_token_and_patch_mean,
        to_vmoe=ToVMoE(
            layer_names=((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after.")),
            layer_scales=(("attention.o_proj", "layer_scale1.lambda1"), ("mlp.fc2", "layer_scale2.lambda1")),
            lost_head="the half of the head that reads the mean of the patches",
            # only masked image modeling reads it
            left_out=("dinov2.embeddings.mask_token",),
        ),
    ),
    DINOv3ViTForImageClassification.__name__: Architecture(
        ("dinov3_vit.embeddings",),
        "dinov3_vit.model.layer",
        ("dinov3_vit.norm",),
        _class_token,
        layer_arguments=_rotary_positions,
        everywhere=("dinov3_vit.rope_embeddings",),
        resize=resize_rope,
    ),
    "BeitForImageClassification": Architecture(
        ("beit.embeddings",),
        "beit.layers",
        ("beit.layernorm", "beit.pooler"),
        _already_pooled,
        layer_arguments=_relative_positions,
        everywhere=("beit.shared_position_bias",),
        resize=resize_beit,
    ),
    "CLIPForImageClassification": Architecture(
        ("vision_model.embeddings", "vision_model.pre_layrnorm"),
        "vision_model.encoder.layers",
        (),
        _patch_mean,
        layer_arguments=_no_mask,
        unused=("vision_model.post_layernorm",),
        resize=resize_embedding,
    ),
    "SiglipForImageClassification": Architecture(
        ("vision_model.embeddings",),
        "vision_model.encoder.layers",
        ("vision_model.post_layernorm",),
        _mean,
        layer_arguments=_no_mask,
        unused=("vision_model.head",),
        resize=resize_embedding,
    ),
    "VMoEForImageClassification": Architecture(
        ("vmoe.embeddings",), "vmoe.layers", ("vmoe.layernorm",), None, to_vmoe=ToVMoE()
    ),
}
