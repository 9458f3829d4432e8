"""
Conversion of official m2mKD state dicts and arguments to ours, dict to dict. Every tensor is placed; otherwise, the
error names it.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import ViTConfig

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.errors import ConversionError


Shapes = dict[str, tuple[int, ...]]


class NameTable:
    """
    Table of official tensor names and ours. In a row, `#` stands for a number and `*` for `weight` or `bias`. The
    first row that matches a name counts.
    """

    def __init__(self, rows: Sequence[tuple[str, str]]):
        self._to_ours = [(_pattern(official), _template(ours)) for official, ours in rows]
        self._to_official = [(_pattern(ours), _template(official)) for official, ours in rows]

    def ours(self, name: str) -> str | None:
        """Our name of an official tensor; `None` if there is none."""
        return _translate(name, self._to_ours)

    def official(self, name: str) -> str | None:
        """The official name of one of our tensors; `None` if there is none."""
        return _translate(name, self._to_official)


def _pattern(row: str) -> re.Pattern[str]:
    return re.compile(re.escape(row).replace(r"\#", r"(\d+)").replace(r"\*", "(weight|bias)"))


def _template(row: str) -> str:
    return re.sub(r"[#*]", "{}", row)


def _translate(name: str, rows: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rows:
        match = pattern.fullmatch(name)
        if match:
            return template.format(*match.groups())
    return None


def _rows(prefix: str) -> list[tuple[str, str]]:
    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.layers.#"
    rows = [
        ("cls_token", f"{embeddings}.cls_token"),
        ("pos_embed", f"{embeddings}.position_embeddings"),
        ("patch_embed.proj.*", f"{embeddings}.patch_embeddings.projection.*"),
        ("norm.*", f"{prefix}.layernorm.*"),
        ("head.*", "classifier.*"),
        ("blocks.#.norm1.*", f"{layer}.layernorm_before.*"),
        ("blocks.#.norm2.*", f"{layer}.layernorm_after.*"),
        ("blocks.#.attn.qkv.*", f"{layer}.attention.qkv_proj.*"),  # cut in three
        ("blocks.#.attn.proj.*", f"{layer}.attention.o_proj.*"),
        ("blocks.#.mlp.fc1.*", f"{layer}.mlp.fc1.*"),
        ("blocks.#.mlp.fc2.*", f"{layer}.mlp.fc2.*"),
    ]
    if prefix == "vmoe":
        rows += [
            ("blocks.#.moe.gate.gate.*", f"{layer}.mlp.router.*"),
            # stacked
            ("blocks.#.moe.experts.#.htoh4.weight", f"{layer}.mlp.experts.#.up_proj"),
            ("blocks.#.moe.experts.#.htoh4.bias", f"{layer}.mlp.experts.#.up_proj_bias"),
            ("blocks.#.moe.experts.#.h4toh.weight", f"{layer}.mlp.experts.#.down_proj"),
            ("blocks.#.moe.experts.#.h4toh.bias", f"{layer}.mlp.experts.#.down_proj_bias"),
        ]
        for side in ("pre_stitch", "post_stitch"):
            rows.append((f"blocks.#.{side}.ln.*", f"{layer}.{side}.layernorm.*"))
            rows.append((f"blocks.#.{side}.fc.*", f"{layer}.{side}.linear.*"))
    return rows


_TABLES = {prefix: NameTable(_rows(prefix)) for prefix in ("vit", "vmoe")}
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)")
_STACKED = re.compile(r"(.+\.mlp\.experts)\.(\w+)")


def transformer_to_ours(
    kind: str, official: Mapping[str, torch.Tensor], layer_offset: int = 0
) -> dict[str, torch.Tensor]:
    """
    Convert an incubated ViT (teacher or meta model), a V-MoE or V-MoE student, or a stage of one, to the names of
    `ViTForImageClassification` or `VMoEForImageClassification`. Stitches keep their place at the first and last layer
    (see `VMoEConfig.pre_stitch_layers`).

    Args:
        kind (`str`): `"vit"` or `"vmoe"`.
        official (`Mapping[str, torch.Tensor]`): `ckpt["model"]`, `ckpt["model_stages"][i]` or
            `ckpt["block_state_dict"]`.
        layer_offset (`int`): Number of layers before this stage; the file of a stage counts its blocks from 0.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors, with `qkv` cut in three and the experts of a layer stacked.

    Raises:
        `ConversionError`: some names do not belong to such a model, or an expert is missing.
    """
    converted: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in without_aliases(official).items():
        ours = _TABLES[kind].ours(_move(name, "blocks", layer_offset))
        expert = _EXPERT.fullmatch(ours or "")
        if ours is None:
            unknown.append(name)
        elif expert:
            # FastMoE keeps a leading dimension of one expert
            experts[f"{expert[1]}.{expert[3]}"][int(expert[2])] = tensor[0]
        elif ".qkv_proj." in ours:
            for part, projection in zip(tensor.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                converted[ours.replace("qkv_proj", projection)] = part.contiguous()
        else:
            converted[ours] = tensor
    if unknown:
        raise ConversionError(f"These tensors do not belong to an official {kind} checkpoint: {sorted(unknown)}.")
    for name, by_index in experts.items():
        siblings = [other for key, other in experts.items() if key.rpartition(".")[0] == name.rpartition(".")[0]]
        if sorted(by_index) != list(range(max(max(other) for other in siblings) + 1)):
            raise ConversionError(f"Some experts of {name} are missing; the checkpoint has only {sorted(by_index)}.")
        converted[name] = torch.stack([by_index[index] for index in range(len(by_index))])
    return converted


def convert_vmoe_student(
    official: Mapping[str, torch.Tensor], layer_offset: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Convert an official V-MoE student to the names of a distilled stage.

    Args:
        official (`Mapping[str, torch.Tensor]`): `ckpt["model"]`.
        layer_offset (`int`): Number of layers before this stage.

    Returns:
        The stage's tensors with the model's names, and those of its stitches (`pre.*`, `post.*`).

    Raises:
        `ConversionError`: as [`transformer_to_ours`].
    """
    stage, stitches = {}, {}
    for name, tensor in transformer_to_ours("vmoe", official, layer_offset).items():
        stitch = re.fullmatch(r"vmoe\.layers\.\d+\.(pre|post)_stitch\.(.+)", name)
        if stitch:
            stitches[f"{stitch[1]}.{stitch[2]}"] = tensor
        else:
            stage[name] = tensor
    return stage, stitches


def without_aliases(official: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out `stages.*`, where the official models register each block a second time."""
    return {name: tensor for name, tensor in official.items() if not name.startswith("stages.")}


def assemble_stages(stages: Sequence[Mapping[str, Any]], depths: Sequence[int]) -> dict[str, Any]:
    """
    Convert `ckpt["model_stages"]` to `ckpt["model"]`: each stage counts its blocks from 0, the model counts through
    all stages.
    """
    return {
        _move(name, "blocks", sum(depths[:index])): tensor
        for index, stage in enumerate(stages)
        for name, tensor in stage.items()
    }


def cut_in_stages(official: Mapping[str, Any], depths: Sequence[int]) -> list[dict[str, Any]]:
    """Convert `ckpt["model"]` without aliases to `ckpt["model_stages"]`: the inverse of [`assemble_stages`]."""
    starts = [sum(depths[:index]) for index in range(len(depths))]
    stages: list[dict[str, Any]] = [{} for _ in depths]
    for name, tensor in official.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            index = max(stage for stage, start in enumerate(starts) if start <= int(block[1]))
        else:
            index = len(depths) - 1 if name.startswith(("norm.", "head.")) else 0
        stages[index][_move(name, "blocks", -starts[index])] = tensor
    return stages


def with_aliases(official: Mapping[str, Any], depths: Sequence[int]) -> dict[str, Any]:
    """The inverse of [`without_aliases`], for a model with stages of these depths; the official code needs them."""
    stages = enumerate(cut_in_stages(official, depths))
    aliases = {f"stages.{index}.{name}": tensor for index, stage in stages for name, tensor in stage.items()}
    return {**official, **aliases}


def _move(name: str, container: str, offset: int) -> str:
    return re.sub(rf"^{container}\.(\d+)\.", lambda match: f"{container}.{int(match[1]) + offset}.", name)


def transformer_to_official(
    kind: str, ours: Mapping[str, torch.Tensor], layer_offset: int = 0
) -> dict[str, torch.Tensor]:
    """
    The inverse of [`transformer_to_ours`].

    Args:
        kind (`str`), layer_offset (`int`): As there.
        ours (`Mapping[str, torch.Tensor]`): State dict of the model or stage, on the meta device if only names and
            shapes matter.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors with official names, without the aliases (see [`with_aliases`]).

    Raises:
        `ConversionError`: some names do not belong to such a model.
    """
    official: dict[str, torch.Tensor] = {}
    for name, tensor in ours.items():
        stacked = _STACKED.fullmatch(name)
        if stacked:
            # FastMoE keeps a leading dimension of one expert
            each = {f"{stacked[1]}.{index}.{stacked[2]}": expert[None] for index, expert in enumerate(tensor)}
        elif ".attention.q_proj." in name:
            parts = [ours[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            each = {name.replace("q_proj", "qkv_proj"): torch.cat(parts)}
        elif ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        else:
            each = {name: tensor}
        for own, value in each.items():
            theirs = _TABLES[kind].official(own)
            if theirs is None:
                raise ConversionError(f"{name} of our {kind} has no official counterpart.")
            official[_move(theirs, "blocks", -layer_offset)] = value
    return official


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Shapes by name, as [`check_tensors`] expects them."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def stitch_shapes(side: str, stitch_size: int, hidden_size: int, layer: int) -> Shapes:
    """Shapes of a stitch of an official V-MoE, by official names; `side` is `"pre"` or `"post"`."""
    width, out = (stitch_size, hidden_size) if side == "pre" else (hidden_size, stitch_size)
    name = f"blocks.{layer}.{side}_stitch"
    layernorm = {f"{name}.ln.weight": (width,), f"{name}.ln.bias": (width,)}
    return {**layernorm, f"{name}.fc.weight": (out, width), f"{name}.fc.bias": (out,)}


def check_tensors(given: Mapping[str, Any], expected: Shapes, what: str) -> None:
    """
    Check that a checkpoint has the expected tensors.

    Raises:
        `ConversionError`: a tensor is missing, unexpected or of another shape; the message lists all by official name.
    """
    lines = [f"missing: {name} {_size(expected[name])}" for name in sorted(expected.keys() - given.keys())]
    for name in sorted(given.keys() - expected.keys()):
        lines.append(f"unexpected: {name} {_size(getattr(given[name], 'shape', ()))}")
    for name in sorted(expected.keys() & given.keys()):
        if not isinstance(given[name], torch.Tensor):
            lines.append(f"not a tensor: {name} is of type {type(given[name]).__name__}")
        elif tuple(given[name].shape) != expected[name]:
            lines.append(f"shape: {name} is {_size(given[name].shape)}, must be {_size(expected[name])}")
    if lines:
        raise ConversionError(
            f"The checkpoint does not contain {what} as the configuration describes it. {len(lines)} of its tensors "
            "do not fit:\n  " + "\n  ".join(lines) + "\nGive the --config that this checkpoint was trained with."
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"


# ---- Configurations ----


class OfficialArguments:
    """Arguments of the official code, which are taken one by one. Those left at the end raise an error."""

    def __init__(self, values: Mapping[str, Any] | None, path: str = ""):
        if values is not None and not isinstance(values, Mapping):
            raise ConversionError(f"`{path.rstrip('.')}` must be a section of arguments, but is {values!r}.")
        self.values, self.path = dict(values or {}), path
        self._sections: list[OfficialArguments] = []

    def take(self, name: str, default: Any) -> Any:
        """Take the value of an argument, or the official default."""
        return self.values.pop(name, default)

    def need(self, name: str) -> Any:
        """Take the value of an argument that has no default."""
        if self.values.get(name) is None:
            raise ConversionError(f"`{self.path}{name}` is missing; the official code has no default for it.")
        return self.values.pop(name)

    def section(self, name: str) -> "OfficialArguments":
        """Take the arguments below a name; none if the name is missing."""
        self._sections.append(OfficialArguments(self.values.pop(name, None), f"{self.path}{name}."))
        return self._sections[-1]

    def require(self, **values: Any) -> None:
        """Take arguments of which only these values can be converted; they are also the official defaults."""
        for name, value in values.items():
            given = self.take(name, value)
            if given != value:
                raise ConversionError(f"`{self.path}{name}` is {given!r}; only {value!r} can be converted.")

    def left(self) -> list[str]:
        """The arguments that were not taken, also those of the sections."""
        return [f"{self.path}{name}" for name in self.values] + [
            name for part in self._sections for name in part.left()
        ]

    def agree(self, name: str, value: Any) -> None:
        """Take an argument that the tensors show as well. If it is given, it must have their value."""
        given = self.take(name, None)
        if given not in (None, value):
            raise ConversionError(
                f"`{self.path}{name}` is {given!r}, but the tensors show {value!r}: the configuration is of another "
                "model."
            )

    def end(self) -> None:
        """Raise an error if any argument was not taken."""
        left = sorted(self.left())
        if left:
            raise ConversionError(f"These arguments of the official code are not known: {left}.")


def vit_config(kwargs: Mapping[str, Any], norm_eps: float, **overrides: Any) -> ViTConfig:
    """
    Build the configuration of an official incubated ViT.

    Args:
        kwargs (`Mapping[str, Any]`): Arguments of its constructor.
        norm_eps (`float`): Epsilon of its layer norms: 1e-6 in ViT-Large, 1e-5 in ViT-Huge.
        overrides: Fields of `ViTConfig` that differ.

    Raises:
        `ConversionError`: an argument is not known, or has a value that `ViTConfig` cannot express.
    """
    arguments = OfficialArguments(kwargs)
    fields = _transformer_fields(arguments, norm_eps)
    # stochastic depth, which the ViT of transformers does not have; it does not affect the weights
    arguments.take("drop_path_rate", 0.0)
    arguments.end()
    return ViTConfig(**{**fields, **overrides})


def vmoe_config(kwargs: Mapping[str, Any], norm_eps: float, **overrides: Any) -> VMoEConfig:
    """
    Build the configuration of an official V-MoE with the layers that `kwargs` describe, including stitches if it keeps
    any.

    Args:
        kwargs (`Mapping[str, Any]`): Arguments of its constructor.
        norm_eps (`float`): Epsilon of its layer norms (1e-6 in all official V-MoEs).
        overrides: Fields of [`VMoEConfig`] that differ.

    Raises:
        `ConversionError`: as [`vit_config`].
    """
    arguments = OfficialArguments(kwargs)
    fields = _transformer_fields(arguments, norm_eps)
    for name in ("is_student", "idx", "set_gate_hook"):
        arguments.take(name, None)
    pre, post = arguments.take("pre_stitch_pos", None), arguments.take("post_stitch_pos", None)
    stitch_size = arguments.take("stitch_dim", None)
    fields.update(
        moe_layers=list(arguments.take("moe_pos", None) or []),
        num_experts=arguments.take("num_expert", 8),
        drop_path_rate=arguments.take("drop_path_rate", 0.0),
        pre_stitch_layers=list(pre or []),
        post_stitch_layers=list(post or []),
        stitch_size=stitch_size if pre or post else None,
    )
    arguments.end()
    return VMoEConfig(**{**fields, **overrides})


def vmoe_student_config(kwargs: Mapping[str, Any], norm_eps: float, num_stages: int, **overrides: Any) -> VMoEConfig:
    """
    Build the configuration of a whole V-MoE without stitches that is cut into `num_stages` equal stages, one of which
    is an official student.

    Args, raises as [`vmoe_config`].
    """
    depth = sum(kwargs["divided_depths"])
    moe_layers = [stage * depth + layer for stage in range(num_stages) for layer in kwargs.get("moe_pos") or []]
    stitches = {"pre_stitch_layers": [], "post_stitch_layers": [], "stitch_size": None}
    whole = {"num_hidden_layers": depth * num_stages, "moe_layers": moe_layers, **stitches}
    return vmoe_config(kwargs, norm_eps, **{**whole, **overrides})


def _transformer_fields(arguments: OfficialArguments, norm_eps: float) -> dict[str, Any]:
    """Fields that the official ViT and V-MoE share."""
    hidden_size = arguments.take("embed_dim", 768)
    depths = arguments.need("divided_depths")
    arguments.take("depth", None)  # the official code uses `divided_depths`
    arguments.require(qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0, hybrid_backbone=None)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": sum(depths),
        "num_attention_heads": arguments.take("num_heads", 12),
        "intermediate_size": int(hidden_size * arguments.take("mlp_ratio", 4.0)),
        "image_size": arguments.take("img_size", 224),
        "patch_size": arguments.take("patch_size", 16),
        "num_channels": arguments.take("in_chans", 3),
        "qkv_bias": arguments.take("qkv_bias", False),
        "num_labels": arguments.take("num_classes", 1000),
        "layer_norm_eps": norm_eps,
    }
