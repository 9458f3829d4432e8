"""The sizes of a vision tower, wherever its configuration keeps them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig, TimmWrapperConfig


# Number of special tokens of architectures that have not only the class token; ours say it in their configuration.
_SPECIAL_TOKENS = {"deit": 2, "siglip_vision_model": 0}


@dataclass(frozen=True)
class TimmSizes:
    """Sizes of a timm ViT, under the names of transformers."""

    hidden_size: int
    num_hidden_layers: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_special_tokens: int


def vision_config(config: PreTrainedConfig) -> Any:
    """The part of a configuration with the sizes of the vision tower: of a CLIP or SigLIP, its `vision_config`."""
    if isinstance(config, TimmWrapperConfig):
        return _timm_sizes(config.to_json_string())
    return getattr(config, "vision_config", config)


@lru_cache(maxsize=16)
def _timm_sizes(config: str) -> TimmSizes:
    """timm's sizes are only in the model itself; one that is no ViT has no patches."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(TimmWrapperConfig.from_dict(json.loads(config))).timm_model
    patches = getattr(model, "patch_embed", None)
    if not hasattr(model, "blocks") or not hasattr(patches, "grid_size"):
        return TimmSizes(model.num_features, 1, (0, 0), (1, 1), 0)
    own = tuple(patches.img_size), tuple(patches.patch_size), model.num_prefix_tokens
    return TimmSizes(model.embed_dim, len(model.blocks), *own)


def num_special_tokens(config: PreTrainedConfig) -> int:
    """Number of tokens before the patches: the class token, the distillation token of a DeiT, registers."""
    config = vision_config(config)
    if hasattr(config, "num_special_tokens"):
        return config.num_special_tokens
    return _SPECIAL_TOKENS.get(config.model_type, 1) + getattr(config, "num_register_tokens", 0)


def patch_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """Number of patches of an image from top to bottom and from left to right."""
    config = vision_config(config)
    (height, width), (patch_height, patch_width) = pair(config.image_size), pair(config.patch_size)
    return height // patch_height, width // patch_width


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A height and a width, given as both or as one number."""
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)
