# Copyright 2026 The m2mkd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Official m2mKD state dicts to ours, dict to dict: every tensor is placed, or the error names it."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch


class ConversionError(ValueError):
    """A checkpoint holds tensors that the layout does not know."""


_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "moe.gate.gate": "mlp.router",
    "pre_stitch.ln": "pre_stitch.layernorm",
    "pre_stitch.fc": "pre_stitch.linear",
    "post_stitch.ln": "post_stitch.layernorm",
    "post_stitch.fc": "post_stitch.linear",
}
_TOP_NAMES = {
    "cls_token": "{prefix}.embeddings.cls_token",
    "pos_embed": "{prefix}.embeddings.position_embeddings",
    "patch_embed.proj.weight": "{prefix}.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "{prefix}.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "{prefix}.layernorm.weight",
    "norm.bias": "{prefix}.layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}
_EXPERT = re.compile(r"moe\.experts\.(\d+)\.(htoh4|h4toh)\.(weight|bias)")
_EXPERT_NAMES = {"htoh4": "up_proj", "h4toh": "down_proj"}


def convert_vit(official: Mapping[str, torch.Tensor], layer_offset: int = 0) -> dict[str, torch.Tensor]:
    """
    An incubated ViT (teacher, meta model, or one of its stages) to the names of `ViTForImageClassification`.

    Args:
        official (`Mapping[str, torch.Tensor]`): `ckpt["model"]`, `ckpt["model_stages"][i]` or
            `ckpt["block_state_dict"]`.
        layer_offset (`int`): Layers before this stage; a stage's own file counts its blocks from 0.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors, `qkv` cut in three.

    Raises:
        `ConversionError`: names that are no incubated ViT's.
    """
    return _convert(official, "vit", layer_offset)


def convert_vmoe(official: Mapping[str, torch.Tensor], layer_offset: int = 0) -> dict[str, torch.Tensor]:
    """
    An official V-MoE, V-MoE student or stage to the names of `VMoEForImageClassification`; the experts of a layer are
    stacked. Stitches keep their place at the first and last layer (see `VMoEConfig.pre_stitch_layers`).

    Args, returns and raises as [`convert_vit`].
    """
    return _convert(official, "vmoe", layer_offset)


def _convert(official: Mapping[str, torch.Tensor], prefix: str, layer_offset: int) -> dict[str, torch.Tensor]:
    converted: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in official.items():
        # the official models register each block a second time under `stages.*`
        if name.startswith("stages."):
            continue
        block = re.match(r"blocks\.(\d+)\.(.+)$", name)
        if name in _TOP_NAMES:
            converted[_TOP_NAMES[name].format(prefix=prefix)] = tensor
        elif block is None:
            unknown.append(name)
        else:
            layer, rest = f"{prefix}.layers.{int(block[1]) + layer_offset}", block[2]
            module, _, parameter = rest.rpartition(".")
            expert = _EXPERT.fullmatch(rest)
            if expert and prefix == "vmoe":
                suffix = "_bias" if expert[3] == "bias" else ""
                # FastMoE keeps a leading dimension of one expert
                experts[f"{layer}.mlp.experts.{_EXPERT_NAMES[expert[2]]}{suffix}"][int(expert[1])] = tensor[0]
            elif module == "attn.qkv":
                for part, projection in zip(tensor.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                    converted[f"{layer}.attention.{projection}.{parameter}"] = part.contiguous()
            elif module in _BLOCK_NAMES:
                converted[f"{layer}.{_BLOCK_NAMES[module]}.{parameter}"] = tensor
            else:
                unknown.append(name)
    if unknown:
        raise ConversionError(f"These tensors are no part of an official {prefix} checkpoint: {sorted(unknown)}.")
    for name, by_index in experts.items():
        siblings = [other for key, other in experts.items() if key.rpartition(".")[0] == name.rpartition(".")[0]]
        if sorted(by_index) != list(range(max(max(other) for other in siblings) + 1)):
            raise ConversionError(f"The experts of {name} are numbered {sorted(by_index)}; some are missing.")
        converted[name] = torch.stack([by_index[index] for index in range(len(by_index))])
    return converted


__all__ = ["ConversionError", "convert_vit", "convert_vmoe"]
