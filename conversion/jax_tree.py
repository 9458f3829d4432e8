"""
Parameter trees of flax, as google-research/vmoe names them: how they are read, what sizes they show, and their names
and layouts in our models.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from m2mkd.conversion.checkpoint_file import read_checkpoint
from m2mkd.conversion.official_models import NameTable, OfficialArguments, Shapes
from m2mkd.conversion.output import Tensors
from m2mkd.conversion.vmoe_jax_files import PartitionedCheckpoint
from m2mkd.errors import ConversionError


_BLOCK = re.compile(r"Encoder/encoderblock_(\d+)/.+")
_ATTENTION = ("query", "key", "value", "out")
POSITIONS = "Encoder/posembed_input/pos_embedding"


def read_parameters(path: Path) -> Tensors:
    """
    Read the parameters of a model, without what a trainer saves beside them.

    Args:
        path (`Path`): What the names of google-research/vmoe's checkpoint files begin with, or the one that ends in
            `.index`, or a file of named arrays (`.npz`, `.safetensors`).

    Returns:
        `dict[str, torch.Tensor]`: Named with `/` between the names of the tree, without the prefix that all of them
        have (`params/`, `target/`).

    Raises:
        `ConversionError`: a file is missing or damaged, or holds no tree of a vision transformer.
    """
    prefix = path.with_name(path.name.removesuffix(".index"))
    if prefix.with_name(f"{prefix.name}.index").is_file():
        checkpoint = PartitionedCheckpoint(prefix)
        root = _root(checkpoint.leaves)
        arrays = checkpoint.read([name for name in checkpoint.leaves if name.startswith(root)])
        return {name.removeprefix(root): array for name, array in arrays}
    if not path.is_file():
        raise ConversionError(f"There is neither a file {path} nor {path}.index.")
    named = {name.replace(".", "/"): array for name, array in read_checkpoint(path).model_of().items()}
    root = _root(named)
    return {name.removeprefix(root): array for name, array in named.items() if name.startswith(root)}


def _root(names: Iterable[str]) -> str:
    roots = {name.removesuffix("embedding/kernel") for name in names if re.search(r"(^|/)embedding/kernel$", name)}
    # moments of the optimizer have the names of the parameters
    roots = {root for root in roots if not root.startswith("opt")}
    if len(roots) != 1:
        raise ConversionError(
            f"A parameter tree has one `embedding/kernel`; this one has {len(roots)}. Flatten only the parameters: "
            'flax.traverse_util.flatten_dict(params, sep="/").'
        )
    return roots.pop()


def transformer_rows(prefix: str) -> list[tuple[str, str]]:
    """Rows of a [`NameTable`] for what a ViT (`prefix` is `"vit"`) and a V-MoE (`"vmoe"`) share."""
    embeddings, layer, block = f"{prefix}.embeddings", f"{prefix}.layers.#", "Encoder/encoderblock_#"
    norms = [
        ("Encoder/encoder_norm", f"{prefix}.layernorm"),
        (f"{block}/LayerNorm_0", f"{layer}.layernorm_before"),
        (f"{block}/LayerNorm_1", f"{layer}.layernorm_after"),
    ]
    return [
        ("cls", f"{embeddings}.cls_token"),
        (POSITIONS, f"{embeddings}.position_embeddings"),
        *dense_rows("embedding", f"{embeddings}.patch_embeddings.projection"),
        *dense_rows("head", "classifier"),
        *attention_rows(f"{block}/SelfAttention", f"{layer}.attention"),
        *dense_rows(f"{block}/Mlp/Dense_0", f"{layer}.mlp.fc1"),
        *dense_rows(f"{block}/Mlp/Dense_1", f"{layer}.mlp.fc2"),
        *((f"{theirs}/scale", f"{ours}.weight") for theirs, ours in norms),
        *((f"{theirs}/bias", f"{ours}.bias") for theirs, ours in norms),
    ]


def attention_rows(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Rows for the projections of an attention."""
    return [row for name in _ATTENTION for row in dense_rows(f"{theirs}/{name}", f"{ours}.{name[0]}_proj")]


def dense_rows(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Rows for a linear layer or a convolution."""
    return [(f"{theirs}/kernel", f"{ours}.weight"), (f"{theirs}/bias", f"{ours}.bias")]


def transformer_fields(arrays: Tensors, arguments: OfficialArguments) -> dict[str, Any]:
    """
    The fields that a ViT and a V-MoE share.

    Args:
        arrays (`dict[str, torch.Tensor]`): The parameters. `arguments` gives `image_size` for images that are not
            square.

    Raises:
        `ConversionError`: an array is missing or has the wrong number of axes, or the image size is not known.
    """
    kernel = array_of(arrays, "embedding/kernel", 4)
    patch_size = list(kernel.shape[:2])
    first = "Encoder/encoderblock_0"
    moe = "Moe/Mlp" if f"{first}/Moe/Mlp/Dense_0/bias" in arrays else "Mlp"
    return {
        "hidden_size": kernel.shape[3],
        "num_hidden_layers": 1 + max((int(match[1]) for match in map(_BLOCK.fullmatch, arrays) if match), default=-1),
        "num_attention_heads": array_of(arrays, f"{first}/SelfAttention/query/kernel", 3).shape[1],
        "intermediate_size": array_of(arrays, f"{first}/{moe}/Dense_0/bias").shape[-1],
        # flax.linen.gelu uses the tanh approximation by default
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_size": arguments.take("image_size", None) or _square(arrays, patch_size),
        "patch_size": patch_size,
        "num_channels": kernel.shape[2],
        "num_labels": array_of(arrays, "head/kernel", 2).shape[1],
    }


def _square(arrays: Tensors, patch_size: list[int]) -> list[int]:
    if POSITIONS not in arrays:
        raise ConversionError(
            f"Without `{POSITIONS}` nothing shows the image size. Give `image_size: [height, width]`."
        )
    grid = array_of(arrays, POSITIONS, 3).shape[1] - ("cls" in arrays)
    side = math.isqrt(grid)
    if side * side != grid:
        raise ConversionError(f"{grid} patches do not form a square. Give `image_size: [height, width]`.")
    return [side * size for size in patch_size]


def array_of(arrays: Tensors, name: str, ndim: int | None = None) -> torch.Tensor:
    """An array that must be there. Raises `ConversionError` if it is missing or has the wrong number of axes."""
    if name not in arrays or ndim not in (None, arrays[name].ndim):
        found = f"has shape {tuple(arrays[name].shape)}" if name in arrays else "is missing"
        raise ConversionError(f"`{name}` {found}; the tree is not that of a classifier with a vision transformer.")
    return arrays[name]


def converted_tree(arrays: Tensors, table: NameTable) -> Tensors:
    """
    Give the arrays our names and layouts. Each is taken out of `arrays`, so that there is never a second copy of all.

    Raises:
        `ConversionError`: some names are not in the table, or an array has the wrong number of axes.
    """
    names = {name: ours for name in arrays if (ours := table.ours(name)) is not None}
    if len(names) < len(arrays):
        raise ConversionError(f"These arrays do not belong to the model: {sorted(arrays.keys() - names.keys())}.")
    return {ours: _to_our_layout(name, arrays.pop(name)).contiguous() for name, ours in names.items()}


def check_tree(converted: Tensors, expected: Shapes, table: NameTable) -> None:
    """Check the shapes against the model's. Raises `ConversionError`, which lists misfits by their JAX names."""
    lines = []
    for name in sorted(expected.keys() | converted.keys()):
        shape = tuple(converted[name].shape) if name in converted else "missing"
        if shape != expected.get(name, "unexpected"):
            lines.append(f"{table.official(name) or name}: {shape}, must be {expected.get(name, 'absent')} (ours)")
    if lines:
        raise ConversionError("The tree does not contain exactly one such model:\n  " + "\n  ".join(lines))


def _to_our_layout(name: str, array: torch.Tensor) -> torch.Tensor:
    *_, module, parameter = f"/{name}".split("/")
    try:
        if name == "embedding/kernel":
            return array.permute(3, 2, 0, 1)
        if module in _ATTENTION and parameter == "bias":
            return array.flatten()
        if module in ("query", "key", "value", "dense"):  # heads, or the members of an ensemble
            return array.flatten(1).T
        if module == "out":
            return array.flatten(0, 1).T
        if parameter == "mu":
            return array.permute(1, 2, 0)
        return array.mT if parameter == "kernel" else array
    except (IndexError, RuntimeError) as error:
        raise ConversionError(
            f"`{name}` has shape {tuple(array.shape)}, which has the wrong number of axes."
        ) from error
