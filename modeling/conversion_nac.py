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
"""Official NAC checkpoints and configurations to ours, dict to dict: what cannot be placed is named in the error."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from m2mkd.configuration.configuration_nac import STEM_STRIDE, NACConfig
from m2mkd.modeling.conversion import ConversionError


_LINEAR_NAMES = {
    "query_compiler": "q_proj",
    "key_compiler": "k_proj",
    "value_compiler": "v_proj",
    "exit_layer": "o_proj",
    "ffn.0": "ffn.fc1",
    "ffn.2": "ffn.fc2",
}
_PARAMETER_NAMES = {
    "native_weight": "weight",
    "native_bias": "bias",
    "scale.weight": "code_projection.weight",
    "scale_gain": "gain",
}
# Whole names, as patterns; `{}` takes their groups in order.
_PATTERNS = [
    (r"backbone\.downsample_layers\.0\.0\.(\w+)", "nac.tokenizer.stages.0.projection.{}"),
    (r"backbone\.downsample_layers\.0\.1\.(\w+)", "nac.tokenizer.stages.0.layernorm.{}"),
    (r"backbone\.downsample_layers\.(\d+)\.0\.(\w+)", "nac.tokenizer.stages.{}.layernorm.{}"),
    (r"backbone\.downsample_layers\.(\d+)\.1\.(\w+)", "nac.tokenizer.stages.{}.projection.{}"),
    (r"backbone\.stages\.(\d+)\.(\d+)\.gamma", "nac.tokenizer.stages.{}.blocks.{}.layer_scale"),
    (r"backbone\.stages\.(\d+)\.(\d+)\.dwconv\.(\w+)", "nac.tokenizer.stages.{}.blocks.{}.depthwise.{}"),
    (r"backbone\.stages\.(\d+)\.(\d+)\.norm\.(\w+)", "nac.tokenizer.stages.{}.blocks.{}.layernorm.{}"),
    (r"backbone\.stages\.(\d+)\.(\d+)\.pwconv([12])\.(\w+)", "nac.tokenizer.stages.{}.blocks.{}.fc{}.{}"),
    (r"positional_grid\.grid", "nac.tokenizer.position_embeddings"),
]
_OUTPUT_NAMES = {"confidence_scorer": "pooling.confidence", "to_logits": "classifier"}
_SEEDER_NAMES = {"layernorm": "layernorm", "code_to_state_mu": "mean", "code_to_state_logvar": "log_variance"}


def convert_nac(official: Mapping[str, torch.Tensor], share_propagators: bool = False) -> dict[str, torch.Tensor]:
    """
    An official `NeuralCompiler` to the names of `NACForImageClassification`.

    The bias of the read-in's keys is left out: it adds the same to all scores of a latent, so no output depends on it.

    Args:
        official (`Mapping[str, torch.Tensor]`): `ckpt["model"]`.
        share_propagators (`bool`): Whether all rounds share the weights of one propagator, which the official
            checkpoint then repeats under every round; they must be equal.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors.

    Raises:
        `ConversionError`: names that are no NAC's, or propagators that should be equal and are not.
    """
    converted: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in official.items():
        ours = _model_name(name)
        if ours is None:
            unknown.append(name)
        elif ours != "":
            converted[ours] = tensor[None] if ours.endswith("position_embeddings") else tensor
    _refuse(unknown, "NAC")
    return _share(converted) if share_propagators else converted


def convert_nac_student(
    official: Mapping[str, torch.Tensor], index: int, num_stages: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    An official NAC student (`ReadInStudent`, `MediatorStudent_i`, `ReadOutStudent`) to the names of a distilled stage.

    Args:
        official (`Mapping[str, torch.Tensor]`): `ckpt["model"]`.
        index (`int`): Stage of the circuit, from 0 (read-in) to `num_stages - 1` (read-out).
        num_stages (`int`): Stages of the circuit: its rounds and two.

    Returns:
        The stage's tensors by the model's names, and those of its stitches (`pre.*`, `post.*`).

    Raises:
        `ConversionError`: names that are no part of this stage.
    """
    is_first, is_last = index == 0, index == num_stages - 1
    stage, stitches, unknown = {}, {}, []
    for name, tensor in official.items():
        side, _, parameter = name.partition("_stitch.")
        if parameter:
            stitches[f"{side}.linear.{parameter}"] = tensor
            continue
        if is_first:
            full = name.replace("tokenizer.", "input_tokenizer.", 1) if name.startswith("tokenizer.") else name
            full = f"latent_graphs.0.{full}" if full.startswith("read_in.") else full
        elif is_last and name.startswith("tokenizer."):
            full = f"output_{name}"
        else:
            part = "read_out" if is_last else f"propagators.{index - 1}"
            full = f"latent_graphs.0.{part}.{name}"
        ours = _model_name(full)
        if ours is None:
            unknown.append(name)
        elif ours != "":
            stage[ours] = tensor[None] if ours.endswith("position_embeddings") else tensor
    _refuse(unknown, f"student of stage {index} of {num_stages} of a NAC")
    return stage, stitches


def _model_name(name: str) -> str | None:
    """Our name of an official tensor; empty if we have no use for it, `None` if it is not known."""
    top, _, rest = name.partition(".")
    if top == "input_tokenizer":
        for pattern, ours in _PATTERNS:
            match = re.fullmatch(pattern, rest)
            if match:
                return ours.format(*match.groups())
        return None
    if top == "output_tokenizer":
        module, _, parameter = rest.partition(".")
        return f"{_OUTPUT_NAMES[module]}.{parameter}" if module in _OUTPUT_NAMES else None
    if top != "latent_graphs" or not rest.startswith("0."):
        return None
    part, _, rest = rest[2:].partition(".")
    if part in ("input_latents", "mediator_latents", "output_latents"):
        is_known = rest in ("codes_", "signatures_", "initial_states_")
        return f"nac.{part}.{rest.removesuffix('_')}" if is_known else None
    if part == "latent_seeder":
        module, _, parameter = rest.partition(".")
        return f"nac.latent_seeder.{_SEEDER_NAMES[module]}.{parameter}" if module in _SEEDER_NAMES else None
    if part == "propagators":
        layer, _, rest = rest.partition(".")
        return _part_name(f"nac.layers.{layer}", rest)
    if part in ("read_in", "read_out"):
        return _part_name(f"nac.{part}", rest)
    return None


def _part_name(prefix: str, rest: str) -> str | None:
    """A tensor of read-in, propagator or read-out."""
    if rest == "read_in_attention.key_compiler.native_bias":
        return ""
    if rest == "latent_attention.kernel.bandwidth":
        return f"{prefix}.kernel.bandwidth"
    head = re.fullmatch(r"head\.(0\.module|1)\.(.+)", rest)
    if head:
        is_layernorm = head[1] != "1"
        parameter = head[2] if is_layernorm else _PARAMETER_NAMES.get(head[2])
        return parameter and f"classifier.{'layernorm' if is_layernorm else 'projection'}.{parameter}"
    module, _, inner = rest.partition(".")
    if module in ("read_in_attention", "latent_attention"):
        prefix = f"{prefix}.attention"
    elif module == "ffn":
        prefix = f"{prefix}.ffn"
    else:
        return None
    if inner == "layer_scale.gamma":
        return f"{prefix}.layer_scale"
    if re.fullmatch(r"(sender_|receiver_)?layernorm\.(weight|bias)", inner):
        return f"{prefix}.{inner}"
    for official, ours in _LINEAR_NAMES.items():
        parameter = _PARAMETER_NAMES.get(inner.removeprefix(f"{official}."))
        if inner.startswith(f"{official}.") and parameter:
            return f"{prefix}.{ours.removeprefix('ffn.')}.{parameter}"
    return None


def _share(converted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = {}
    for name, tensor in converted.items():
        layer = re.match(r"nac\.layers\.(\d+)\.", name)
        if layer is None or layer[1] == "0":
            kept[name] = tensor
            continue
        first = name.replace(layer[0], "nac.layers.0.", 1)
        if first not in converted or not torch.equal(converted[first], tensor):
            raise ConversionError(f"The propagators are said to be shared, but {name} differs from {first}.")
    return kept


def _refuse(unknown: list[str], what: str) -> None:
    if unknown:
        raise ConversionError(f"These tensors are no part of an official {what}: {sorted(unknown)}.")


# ---- Configurations ----

_GRAPH_PRIORS = {
    "barabasi-albert": "barabasi_albert",
    "planted-partition": "planted_partition",
    "ring-of-cliques": "ring_of_cliques",
    "erdos-renyi": "erdos_renyi",
    "watts-strogatz": "watts_strogatz",
    "grid-graph": "grid",
    "balanced-tree": "balanced_tree",
    "barbell": "barbell",
    "hypercube": "hypercube",
    "complete": "complete",
}
_TOKENIZER_DEPTHS = {
    "tiny": [3, 3, 9],
    "mini": [3, 3, 6],
    "micro": [3, 3, 3],
    "nano": [1, 1, 1],
    "pico": [1, 1, 0],
    "femto": [1, 0, 0],
    "atto": [0, 0, 0],
}


class _Arguments:
    """Arguments of the official code, taken one by one; what is left at the end is refused by name."""

    def __init__(self, values: Mapping[str, Any] | None, path: str):
        self.values, self.path = dict(values or {}), path

    def take(self, name: str, default: Any) -> Any:
        return self.values.pop(name, default)

    def section(self, name: str) -> "_Arguments":
        return _Arguments(self.values.pop(name, None), f"{self.path}{name}.")

    def require(self, name: str, value: Any) -> None:
        """Only this value can be converted; it is also the official default."""
        given = self.take(name, value)
        if given != value:
            raise ConversionError(f"`{self.path}{name}` is {given!r}; only {value!r} can be converted.")

    def end(self) -> None:
        if self.values:
            raise ConversionError(f"These arguments of the official NAC are not known: {self._left()}.")

    def _left(self) -> list[str]:
        return sorted(f"{self.path}{name}" for name in self.values)


def nac_config(kwargs: Mapping[str, Any], **overrides: Any) -> NACConfig:
    """
    The configuration of an official `NeuralCompiler`.

    Args:
        kwargs (`Mapping[str, Any]`): Its constructor's arguments: `model.kwargs` of an official YAML file.
        overrides: Fields of [`NACConfig`] that differ.

    Raises:
        `ConversionError`: an argument is not known, or has a value that no `NACConfig` expresses.
    """
    model = _Arguments(kwargs, "")
    fields: dict[str, Any] = {
        "num_channels": model.take("input_dim", 3),
        "num_labels": model.take("output_dim", None),
        "hidden_size": model.take("state_dim", None),
    }
    # where the official trainer finds weights, not what the model is
    for name in ("simplified_interface", "student_state_dict_dir", "student_type"):
        model.take(name, None)
    model.require("input_tokenizer_type", "ConvNeXtImageTokenizer")
    model.require("latent_graph_type", "LatentGraph")
    fields.update(_tokenizer_fields(model.section("input_tokenizer_kwargs"), fields["hidden_size"]))
    output = model.section("output_tokenizer_kwargs")
    fields.update(_pooling_fields(model.take("output_tokenizer_type", "FirstSlotAsLogits"), output))
    fields.update(_graph_fields(model.section("latent_graph_kwargs"), fields))
    for name in ("predefined_states_dir", "stitch_ckpt_path", "stitch_dim"):
        model.require(name, None)
    model.end()
    return NACConfig(**{**fields, **overrides})


def nac_student_config(share: Mapping[str, Any], role: str, own: Mapping[str, Any], **overrides: Any) -> NACConfig:
    """
    The configuration of a NAC whose stage is an official student.

    Args:
        share (`Mapping[str, Any]`): `share_kwargs` of an official student configuration.
        role (`str`): `"readin"`, `"mediator"` or `"readout"`.
        own (`Mapping[str, Any]`): The arguments of that role.
        overrides: Fields of [`NACConfig`] that differ, e.g. `num_hidden_layers`.

    Raises:
        `ConversionError`: as [`nac_config`].
    """
    shared, mine = _Arguments(share, "share_kwargs."), _Arguments(own, f"{role}.")
    fields: dict[str, Any] = {"hidden_size": shared.take("state_dim", None)}
    fields.update(_common_fields(shared, fields["hidden_size"]))
    fields["num_attention_heads"], fields["head_dim"] = mine.take("num_heads", 6), mine.take("head_dim", 64)
    rate = mine.take("path_drop_prob", 0.0)
    if role == "readin":
        fields["num_channels"] = mine.take("input_dim", 3)
        mine.require("tokenizer_type", "ConvNeXtImageTokenizer")
        fields.update(_tokenizer_fields(mine.section("tokenizer_kwargs"), fields["hidden_size"]))
        fields["read_in_residual"] = mine.take("include_residual_in_read_in_attention", False)
        fields["read_in_drop_path_rate"] = rate
    elif role == "mediator":
        fields["drop_path_rate"] = rate
        fields["share_layernorm"] = mine.section("latent_attention_kwargs").take("share_layernorm", False)
    elif role == "readout":
        fields["read_out_drop_path_rate"] = rate
        fields["num_labels"] = mine.take("output_dim", None)
        fields["read_out_residual"] = mine.take("include_residual_in_latent_attention", False)
        tokenizer = mine.take("tokenizer_type", "FirstSlotAsLogits")
        fields.update(_pooling_fields(tokenizer, mine.section("tokenizer_kwargs")))
        fields.update(_head_fields(mine, fields["pooling"]))
    else:
        raise ConversionError(f"The role of a NAC student is 'readin', 'mediator' or 'readout', not {role!r}.")
    shared.end()
    mine.end()
    return NACConfig(**{**fields, **overrides})


def _tokenizer_fields(arguments: _Arguments, hidden_size: int) -> dict[str, Any]:
    num_stages = arguments.take("num_stages", 3)
    preset = arguments.take("capacity_preset", "tiny")
    if preset not in _TOKENIZER_DEPTHS:
        raise ConversionError(f"`capacity_preset` is {preset!r}; known are {sorted(_TOKENIZER_DEPTHS)}.")
    arguments.require("convnext_kwargs", None)
    grid = arguments.section("positional_grid_kwargs")
    size, grid_size = grid.take("dim", 0), grid.take("grid_size", [8, 8])
    stride = STEM_STRIDE * 2 ** (num_stages - 1)
    grid.end()
    arguments.end()
    sizes = [stride * side for side in grid_size]
    return {
        "tokenizer_depths": _TOKENIZER_DEPTHS[preset][:num_stages],
        "tokenizer_hidden_sizes": [hidden_size // 4, hidden_size // 2, hidden_size][:num_stages],
        "position_embedding_size": size,
        "image_size": sizes[0] if sizes[0] == sizes[1] else sizes,
    }


def _pooling_fields(tokenizer: str, arguments: _Arguments) -> dict[str, Any]:
    if tokenizer == "FirstSlotAsLogits":
        arguments.end()
        return {"pooling": "first"}
    if tokenizer != "OutputLatentPooling":
        raise ConversionError(f"`output_tokenizer_type` {tokenizer!r} cannot be converted.")
    names = {"gumbel": "gumbel", "gumbel-hard": "gumbel_hard", "vanilla": "softmax"}
    softmax = arguments.take("softmax_type", "gumbel")
    if softmax not in names:
        raise ConversionError(f"`softmax_type` is {softmax!r}; known are {sorted(names)}.")
    fields = {"pooling": names[softmax], "pooling_temperature": arguments.take("softmax_temperature", 1.0)}
    arguments.end()
    return fields


def _head_fields(arguments: _Arguments, pooling: str) -> dict[str, Any]:
    has_head = arguments.take("use_head", True)
    if has_head != (pooling == "first"):
        raise ConversionError(
            f"`{arguments.path}use_head` is {has_head}, but the output tokenizer is of type {pooling!r}: a head goes "
            "with FirstSlotAsLogits, and only with it."
        )
    return {"head_layernorm": arguments.take("pre_output_layernorm", True)}


def _common_fields(arguments: _Arguments, hidden_size: int) -> dict[str, Any]:
    """What full model and students share."""
    fields = {
        "code_size": arguments.take("code_dim", None),
        "layer_scale_init_value": arguments.take("layer_scale_initial_value", 1e-6),
        "use_geglu": arguments.take("use_geglu", False),
        "qkv_bias": arguments.take("qkv_bias_in_attention", True),
        "intermediate_size": round(arguments.take("ffn_capacity_factor", 1.0) * hidden_size),
    }
    arguments.require("mod_fc_cls", "ModFC")
    arguments.require("ffn_mod_fc_cls", None)
    arguments.require("ffn_mod_fc_kwargs", None)
    modulation = arguments.section("mod_fc_kwargs")
    fields["code_scale_gain"] = modulation.take("scale_gain", 1.0)
    fields["learnable_code_scale_gain"] = modulation.take("learnable_scale_gain", False)
    fields["add_one_to_code_scale"] = modulation.take("add_one_to_scale", False)
    modulation.require("scale_normalization_type", "ln")
    modulation.require("scale_dropout", 0.0)
    modulation.require("scale_times_input_normalization_type", "none")
    modulation.end()
    return fields


def _graph_fields(graph: _Arguments, known: dict[str, Any]) -> dict[str, Any]:
    rate = graph.take("path_drop_prob", 0.0)
    heads = {"num_attention_heads": graph.take("num_heads", 1), "head_dim": graph.take("head_dim", 64)}
    fields = {
        **_common_fields(graph, known["hidden_size"]),
        **heads,
        "signature_size": graph.take("signature_dim", None),
        "num_input_latents": graph.take("num_input_latents", None),
        "num_mediator_latents": graph.take("num_mediator_latents", None),
        "num_output_latents": graph.take("num_output_latents", None),
        "num_hidden_layers": graph.take("num_iterations", None),
        "share_propagators": graph.take("share_propagator_weights", True),
        "drop_path_rate": rate,
        "code_noise_scale": graph.take("code_noise_scale", None) or 0.0,
        "use_code_noise_in_latent_seeder": graph.take("use_code_noise_in_latent_seeder", False),
        "learnable_signatures": graph.take("learnable_signatures", True),
        "share_codes_between_layers": graph.take("share_codes_between_iterations", True),
        "input_to_output": graph.take("enable_input_output_communication", True),
        "mediators_start_as_inputs": graph.take("use_input_states_as_mediator_states", False),
        "use_latent_seeder": graph.take("use_latent_seeder", True),
    }
    persistent = graph.take("enable_persistent_input_mediator_communication", True)
    never = graph.take("disable_input_mediator_communication", False)
    fields["input_to_mediator"] = "none" if never else "all" if persistent else "first"
    for name, value in (
        ("learnable_codes", True),
        ("share_ffn_between_propagators", False),
        ("read_in_cls", "AttentiveReadIn"),
        ("propagator_layerwise_kwargs", None),
        ("predefined_codes_dir", None),
        ("stitch_ckpt_path", None),
        ("stitch_dim", None),
        ("student_state_dict_dir", None),
    ):
        graph.require(name, value)
    graph.require("output_dim", known["num_labels"])
    graph.require("state_dim", known["hidden_size"])
    seeder = graph.section("latent_seeder_kwargs")
    fields["use_state_noise"] = seeder.take("use_state_noise", True)
    seeder.require("use_code_as_mean_state", False)
    seeder.end()
    for name in ("input_latent_kwargs", "output_latent_kwargs"):
        graph.require(name, None)
    fields.update(_prior_fields(graph.section("mediator_latent_kwargs"), fields["num_mediator_latents"]))
    fields.update(_read_in_fields(graph.section("read_in_kwargs"), heads, rate, fields["layer_scale_init_value"]))
    fields.update(_propagator_fields(graph.section("propagator_kwargs")))
    fields.update(_read_out_fields(graph.section("read_out_kwargs"), rate, known["pooling"]))
    graph.end()
    return fields


def _prior_fields(latents: _Arguments, num_latents: int) -> dict[str, Any]:
    preset = latents.take("graph_preset", None)
    generator = dict(latents.take("graph_generator_kwargs", None) or {})
    latents.require("init_with_identical_codes", False)
    latents.end()
    if preset is not None and preset not in _GRAPH_PRIORS:
        raise ConversionError(f"`graph_preset` is {preset!r}; known are {sorted(_GRAPH_PRIORS)}.")
    if generator.pop("n", num_latents) != num_latents:
        raise ConversionError(f"The graph's `n` is not the number of mediators, {num_latents}.")
    # the official fit has its truncation in the code (defect 17)
    truncation = {} if preset is None else {"graph_prior_truncation": 0.8}
    prior = _GRAPH_PRIORS[preset] if preset is not None else None
    return {"graph_prior": prior, "graph_prior_kwargs": generator, **truncation}


def _read_in_fields(
    read_in: _Arguments, heads: dict[str, int], rate: float, layer_scale_init_value: float
) -> dict[str, Any]:
    read_in.require("num_heads", heads["num_attention_heads"])
    read_in.require("head_dim", heads["head_dim"])
    read_in.require("ffn_layer_scale_initial_value", layer_scale_init_value)
    fields = {
        "read_in_residual": read_in.take("include_residual_in_read_in_attention", False),
        "read_in_drop_path_rate": read_in.take("path_drop_prob", rate),
        "read_in_layer_scale_init_value": read_in.take("read_in_layer_scale_initial_value", 1.0),
    }
    read_in.end()
    return fields


def _propagator_fields(propagator: _Arguments) -> dict[str, Any]:
    attention = propagator.section("latent_attention_kwargs")
    propagator.require("include_residual_in_latent_attention", True)
    attention.require("kernel_type", "DotProductKernel")
    attention.require("mask_attn_scores_with_affinities", True)
    attention.require("scale_attention_by_affinities_after_softmax", False)
    # the softmax does not see it (defect 19)
    attention.take("normalize_kernel_along_keys", True)
    fields: dict[str, Any] = {"share_layernorm": attention.take("share_layernorm", False)}
    kernel = attention.section("kernel_kwargs")
    fields["kernel_truncation"] = kernel.take("truncation", None)
    fields["kernel_truncation_type"] = kernel.take("truncation_implementation", "direct")
    fields["kernel_bandwidth"] = kernel.take("initial_bandwidth", 1.0)
    fields["learnable_bandwidth"] = kernel.take("learnable_bandwidth", True)
    fields["stochastic_kernel"] = kernel.take("stochastic_kernel", False)
    fields["kernel_temperature"] = kernel.take("stochastic_sampling_temperature", 1.0)
    if fields["kernel_truncation_type"] == "masked":
        kernel.require("straight_through", True)
    # without an effect on the other type: what is cut has no gradient either way (defect 19)
    kernel.take("straight_through", True)
    kernel.require("use_gumbel_along_functions", False)
    kernel.require("stochastic_eval_behaviour", "no_sample")
    for section in (kernel, attention, propagator):
        section.end()
    return fields


def _read_out_fields(read_out: _Arguments, rate: float, pooling: str) -> dict[str, Any]:
    fields = {
        "read_out_residual": read_out.take("include_residual_in_latent_attention", True),
        "read_out_drop_path_rate": read_out.take("path_drop_prob", rate),
        **_head_fields(read_out, pooling),
    }
    read_out.end()
    return fields


__all__ = ["convert_nac", "convert_nac_student", "nac_config", "nac_student_config"]
