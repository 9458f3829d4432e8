"""Pretrained networks adapted in place to square images of another size, as transformers interpolates positions."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.beit.modeling_beit import BeitRelativePositionBias


@torch.no_grad()
def resize_parameter(model: PreTrainedModel, image_size: int) -> None:
    """ViT, DeiT, DINOv2 and BEiT: interpolate the parameter with the position embeddings."""
    stem = model.base_model.embeddings
    num_patches = (image_size // model.config.patch_size) ** 2
    old = stem.position_embeddings
    if old is not None:
        num_special_tokens = old.shape[1] - stem.patch_embeddings.num_patches
        tokens = old.new_zeros(1, num_patches + num_special_tokens, old.shape[-1])
        stem.position_embeddings = nn.Parameter(stem.interpolate_pos_encoding(tokens, image_size, image_size).clone())
    for part in (stem, stem.patch_embeddings):
        part.image_size = (image_size, image_size)
    stem.patch_embeddings.num_patches = num_patches
    model.config.image_size = image_size


@torch.no_grad()
def resize_beit(model: PreTrainedModel, image_size: int) -> None:
    """Absolute and relative positions of a BEiT: each table gets the entries that its forward would interpolate."""
    side = image_size // model.config.patch_size
    for bias in [module for module in model.modules() if isinstance(module, BeitRelativePositionBias)]:
        height, width = (2 * own - 1 for own in bias.window_size)
        table = bias.relative_position_bias_table
        # the names of transformers: its width comes first
        grid = table[:-3].reshape(1, width, height, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(2 * side - 1, 2 * side - 1), mode="bilinear")
        entries = grid.permute(0, 2, 3, 1).reshape((2 * side - 1) ** 2, -1)
        bias.relative_position_bias_table = nn.Parameter(torch.cat([entries, table[-3:]]))
        bias.window_size, bias.num_relative_distance = (side, side), len(entries) + 3
    resize_parameter(model, image_size)


@torch.no_grad()
def resize_embedding(model: PreTrainedModel, image_size: int) -> None:
    """CLIP and SigLIP: interpolate the `nn.Embedding` with the positions."""
    stem = model.vision_model.embeddings
    old, num_patches = stem.position_embedding.weight, (image_size // stem.patch_size) ** 2
    tokens = old.new_zeros(1, num_patches + stem.num_positions - stem.num_patches, old.shape[-1])
    new = stem.interpolate_pos_encoding(tokens, image_size, image_size)[0].clone()
    stem.position_embedding = nn.Embedding.from_pretrained(new, freeze=False)
    stem.position_ids = torch.arange(len(new), device=new.device).expand((1, -1))
    stem.num_patches, stem.num_positions, stem.image_size = num_patches, len(new), image_size
    model.config.vision_config.image_size = image_size


def resize_rope(model: PreTrainedModel, image_size: int) -> None:
    """DINOv3: rotary positions are computed from the size of the image."""
    model.config.image_size = image_size


def resize_timm(model: PreTrainedModel, image_size: int) -> None:
    """A timm ViT: timm resamples its positions; the configuration says with which size to build it again."""
    model.timm_model.set_input_size(img_size=image_size)
    model.config.model_args = {**(model.config.model_args or {}), "img_size": image_size}
