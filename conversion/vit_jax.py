"""ViTs of big_vision and vision_transformer (JAX) as those of transformers: pure functions."""

import re

import torch.nn.functional as F
from transformers import ViTConfig

from m2mkd.conversion.jax_tree import POSITIONS, transformer_fields, transformer_rows
from m2mkd.conversion.official_models import NameTable, OfficialArguments
from m2mkd.conversion.output import Tensors
from m2mkd.errors import ConversionError


VIT_JAX_TABLE = NameTable(transformer_rows("vit"))
# Their names and those of google-research/vmoe. Modules are numbered within their class, before flax.linen within
# their block.
_RENAMED = [
    (re.compile(r"^Transformer/"), "Encoder/"),
    (re.compile(r"/MultiHeadDotProductAttention_[01]/"), "/SelfAttention/"),
    (re.compile(r"/MlpBlock_[03]/"), "/Mlp/"),
    (re.compile(r"/LayerNorm_2/"), "/LayerNorm_1/"),
]


def with_vmoe_names(arrays: Tensors) -> Tensors:
    """
    Give the arrays of a ViT the names that the dense parts of a V-MoE of google-research/vmoe have.

    Args:
        arrays (`dict[str, torch.Tensor]`): From [`read_parameters`]; emptied.

    Raises:
        `ConversionError`: the ViT does not classify by its class token alone, as that of transformers does.
    """
    for name, why in (("MAPHead_0/probe", "attention pooling"), ("pre_logits/kernel", "a representation layer")):
        if name in arrays:
            raise ConversionError(
                f"The tree has `{name}`, part of {why}, which the ViT of transformers does not have."
            )
    if "cls" not in arrays:
        raise ConversionError("The tree has no `cls`, but the ViT of transformers classifies by a class token.")
    renamed = {}
    for name in list(arrays):
        array = arrays.pop(name)
        if name == "pos_embedding":
            # in big_vision the class token has no position
            name, array = POSITIONS, F.pad(array, (0, 0, 1, 0))
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        renamed[name] = array
    return renamed


def vit_jax_config(arrays: Tensors, arguments: OfficialArguments) -> ViTConfig:
    """
    Build the configuration of a ViT, all of which comes from its arrays.

    Args:
        arrays (`dict[str, torch.Tensor]`): From [`with_vmoe_names`].
        arguments (`OfficialArguments`): `image_size` for images that are not square.

    Raises:
        `ConversionError`: the tree is not that of a ViT, or an argument is missing or not known.
    """
    fields = transformer_fields(arrays, arguments)
    arguments.end()
    return ViTConfig(**fields)
