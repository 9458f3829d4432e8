"""Names, layouts and arguments of google-research/vmoe (JAX) and of our V-MoE: pure functions."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.conversion.official_models import NameTable, OfficialArguments, Shapes
from m2mkd.errors import ConversionError


def _rows() -> list[tuple[str, str]]:
    embeddings, layer = "vmoe.embeddings", "vmoe.layers.#"
    rows = [
        ("cls", f"{embeddings}.cls_token"),
        ("Encoder.posembed_input.pos_embedding", f"{embeddings}.position_embeddings"),
    ]
    dense = [
        ("embedding", f"{embeddings}.patch_embeddings.projection"),
        ("head", "classifier"),
        ("Encoder.encoderblock_#.SelfAttention.query", f"{layer}.attention.q_proj"),
        ("Encoder.encoderblock_#.SelfAttention.key", f"{layer}.attention.k_proj"),
        ("Encoder.encoderblock_#.SelfAttention.value", f"{layer}.attention.v_proj"),
        ("Encoder.encoderblock_#.SelfAttention.out", f"{layer}.attention.o_proj"),
        ("Encoder.encoderblock_#.Mlp.Dense_0", f"{layer}.mlp.fc1"),
        ("Encoder.encoderblock_#.Mlp.Dense_1", f"{layer}.mlp.fc2"),
        ("Encoder.encoderblock_#.Moe.Router.dense", f"{layer}.mlp.router"),
    ]
    norms = [
        ("Encoder.encoder_norm", "vmoe.layernorm"),
        ("Encoder.encoderblock_#.LayerNorm_0", f"{layer}.layernorm_before"),
        ("Encoder.encoderblock_#.LayerNorm_1", f"{layer}.layernorm_after"),
    ]
    experts = [
        ("Encoder.encoderblock_#.Moe.Mlp.Dense_0", f"{layer}.mlp.experts.up_proj"),
        ("Encoder.encoderblock_#.Moe.Mlp.Dense_1", f"{layer}.mlp.experts.down_proj"),
    ]
    for kernel, names in (("kernel", dense), ("scale", norms)):
        for theirs, ours in names:
            rows += [(f"{theirs}.{kernel}", f"{ours}.weight"), (f"{theirs}.bias", f"{ours}.bias")]
    for theirs, ours in experts:
        rows += [(f"{theirs}.kernel", ours), (f"{theirs}.bias", f"{ours}_bias")]
    return rows


_TABLE = NameTable(_rows())
_BLOCK = re.compile(r"Encoder\.encoderblock_(\d+)\.(.+)")


def plain_names(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Give the arrays of the parameter tree dotted names, without the prefix that all of them have (`params/`,
    `target/`).

    Args:
        arrays (`Mapping[str, torch.Tensor]`): Flattened with `/` or `.` between the names.

    Raises:
        `ConversionError`: the tree does not have the root of a V-MoE.
    """
    dotted = {name.replace("/", "."): array for name, array in arrays.items()}
    roots = {name.removesuffix("embedding.kernel") for name in dotted if re.search(r"(^|\.)embedding\.kernel$", name)}
    if len(roots) != 1:
        raise ConversionError(
            f"A parameter tree of google-research/vmoe has one `embedding/kernel`; this one has {len(roots)}. Flatten "
            'only the parameters: flax.traverse_util.flatten_dict(params, sep="/").'
        )
    (root,) = roots
    return {name.removeprefix(root): array for name, array in dotted.items()}


def vmoe_jax_config(arrays: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> VMoEConfig:
    """
    Build the configuration of a V-MoE of google-research/vmoe: sizes come from the arrays, everything else from
    arguments.

    Args:
        arrays (`Mapping[str, torch.Tensor]`): From [`plain_names`].
        arguments (`Mapping[str, Any]`): `num_selected_experts` of the router, and, to continue training, its
            `noise_std`, `importance_loss_weight` and `load_loss_weight`; `image_size` for images that are not square.

    Raises:
        `ConversionError`: our V-MoE cannot express the model, or an argument is missing or not known.
    """
    if "cls" not in arrays:
        raise ConversionError('The tree has no `cls`: only classifier="token" can be converted, not "gap" or "map".')
    for name, why in (("pre_logits.kernel", "a representation layer"), ("MapHead.probe", "attention pooling")):
        if name in arrays:
            raise ConversionError(f"The tree has `{name}`, which is part of {why}. Our V-MoE does not support that.")
    blocks = [match for name in arrays if (match := _BLOCK.fullmatch(name))]
    sparse = sorted(int(match[1]) for match in blocks if match[2] == "Moe.Router.dense.kernel")
    kernel, rest = _array(arrays, "embedding.kernel", 4), OfficialArguments(arguments)
    grid = _array(arrays, "Encoder.posembed_input.pos_embedding", 3).shape[1] - 1
    side, patch_size = math.isqrt(grid), list(kernel.shape[:2])
    image_size = rest.take("image_size", [side * patch_size[0], side * patch_size[1]] if side * side == grid else None)
    if image_size is None:
        raise ConversionError(f"{grid} patches do not form a square. Give `image_size: [height, width]`.")
    kind = "Moe.Mlp" if 0 in sparse else "Mlp"
    fields = {
        "hidden_size": kernel.shape[3],
        "num_hidden_layers": 1 + max((int(match[1]) for match in blocks), default=-1),
        "num_attention_heads": _array(arrays, "Encoder.encoderblock_0.SelfAttention.query.kernel", 3).shape[1],
        "intermediate_size": _array(arrays, f"Encoder.encoderblock_0.{kind}.Dense_0.bias").shape[-1],
        # flax.linen.gelu uses the tanh approximation by default
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": kernel.shape[2],
        "moe_layers": sparse,
        "num_labels": _array(arrays, "head.kernel", 2).shape[1],
    }
    if sparse:
        router = _array(arrays, f"Encoder.encoderblock_{sparse[0]}.Moe.Router.dense.kernel", 2)
        fields.update(
            num_experts=router.shape[1],
            num_experts_per_tok=rest.need("num_selected_experts"),
            norm_topk_prob=False,
            router_noise_std=rest.take("noise_std", 0.0),
            # they sum the losses of all layers, we average them
            router_importance_loss_coef=len(sparse) * rest.take("importance_loss_weight", 0.0),
            router_load_loss_coef=len(sparse) * rest.take("load_loss_weight", 0.0),
        )
    rest.end()
    return VMoEConfig(**fields)


def convert_vmoe_jax(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Convert the arrays of a V-MoE of google-research/vmoe to the names and layouts of `VMoEForImageClassification`.
    Their routers have no bias; ours get zeros.

    Args:
        arrays (`Mapping[str, torch.Tensor]`): From [`plain_names`].

    Raises:
        `ConversionError`: some names do not belong to that code.
    """
    unknown = sorted(name for name in arrays if _TABLE.ours(name) is None)
    if unknown:
        raise ConversionError(f"These arrays do not belong to a V-MoE of google-research/vmoe: {unknown}.")
    converted = {}
    for name, array in arrays.items():
        ours = _TABLE.ours(name)
        converted[ours] = _to_our_layout(name, array).contiguous()
        if ours.endswith(".router.weight"):
            converted[ours.replace("weight", "bias")] = array.new_zeros(array.shape[1])
    return converted


def check_vmoe_jax(converted: Mapping[str, torch.Tensor], expected: Shapes) -> None:
    """Check the shapes against the model's. Raises `ConversionError`, which lists misfits by their JAX names."""
    lines = []
    for name in sorted(expected.keys() | converted.keys()):
        shape = tuple(converted[name].shape) if name in converted else "missing"
        if shape != expected.get(name, "unexpected"):
            lines.append(f"{_TABLE.official(name) or name}: {shape}, must be {expected.get(name, 'absent')} (ours)")
    if lines:
        raise ConversionError("The tree does not contain exactly one V-MoE:\n  " + "\n  ".join(lines))


def _to_our_layout(name: str, array: torch.Tensor) -> torch.Tensor:
    if name == "embedding.kernel":
        return array.permute(3, 2, 0, 1)
    if ".SelfAttention." in name:
        if name.endswith(".bias"):
            return array.flatten()
        return array.flatten(0, 1).T if ".out." in name else array.flatten(1).T
    return array.mT if name.endswith(".kernel") else array


def _array(arrays: Mapping[str, torch.Tensor], name: str, ndim: int | None = None) -> torch.Tensor:
    if name not in arrays or ndim not in (None, arrays[name].ndim):
        found = f"has shape {tuple(arrays[name].shape)}" if name in arrays else "is missing"
        raise ConversionError(f"`{name.replace('.', '/')}` {found}; the tree is not that of a V-MoE classifier.")
    return arrays[name]
