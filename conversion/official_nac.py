"""Official NAC checkpoints and configurations to ours, dict to dict: what cannot be placed is named in the error."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from m2mkd.configuration.configuration_nac import STEM_STRIDE, NACConfig
from m2mkd.conversion.official_models import NameTable, OfficialArguments, Shapes
from m2mkd.errors import ConversionError
from m2mkd.modeling.nac_layers import MIN_BANDWIDTH


_MODULATED = {
    "native_weight": "weight",
    "native_bias": "bias",
    "scale.weight": "code_projection.weight",
    "scale_gain": "gain",
}


def _modulated(official: str, ours: str) -> list[tuple[str, str]]:
    """Rows of a modulated linear layer."""
    return [(f"{official}.{theirs}", f"{ours}.{name}") for theirs, name in _MODULATED.items()]


def _part(official: str, ours: str, attention: str) -> list[tuple[str, str]]:
    """Rows of read-in, propagator or read-out: attention and feed-forward."""
    theirs = f"{official}.{attention}"
    rows = [
        (f"{official}.latent_attention.kernel.bandwidth", f"{ours}.kernel.bandwidth"),
        (f"{theirs}.receiver_layernorm.*", f"{ours}.attention.receiver_layernorm.*"),
        (f"{theirs}.sender_layernorm.*", f"{ours}.attention.sender_layernorm.*"),
        (f"{theirs}.layer_scale.gamma", f"{ours}.attention.layer_scale"),
        (f"{official}.ffn.layernorm.*", f"{ours}.ffn.layernorm.*"),
        (f"{official}.ffn.layer_scale.gamma", f"{ours}.ffn.layer_scale"),
        *_modulated(f"{official}.ffn.ffn.0", f"{ours}.ffn.fc1"),
        *_modulated(f"{official}.ffn.ffn.2", f"{ours}.ffn.fc2"),
    ]
    for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rows += _modulated(f"{theirs}.{name}_compiler", f"{ours}.attention.{projection}")
    return rows + _modulated(f"{theirs}.exit_layer", f"{ours}.attention.o_proj")


def _rows() -> list[tuple[str, str]]:
    backbone, stage, graph = "input_tokenizer.backbone", "nac.tokenizer.stages", "latent_graphs.0"
    rows = [
        # the stem normalises its output, the other stages their input
        (f"{backbone}.downsample_layers.0.0.*", f"{stage}.0.projection.*"),
        (f"{backbone}.downsample_layers.0.1.*", f"{stage}.0.layernorm.*"),
        (f"{backbone}.downsample_layers.#.0.*", f"{stage}.#.layernorm.*"),
        (f"{backbone}.downsample_layers.#.1.*", f"{stage}.#.projection.*"),
        (f"{backbone}.stages.#.#.gamma", f"{stage}.#.blocks.#.layer_scale"),
        (f"{backbone}.stages.#.#.dwconv.*", f"{stage}.#.blocks.#.depthwise.*"),
        (f"{backbone}.stages.#.#.norm.*", f"{stage}.#.blocks.#.layernorm.*"),
        (f"{backbone}.stages.#.#.pwconv1.*", f"{stage}.#.blocks.#.fc1.*"),
        (f"{backbone}.stages.#.#.pwconv2.*", f"{stage}.#.blocks.#.fc2.*"),
        ("input_tokenizer.positional_grid.grid", "nac.tokenizer.position_embeddings"),
        (f"{graph}.latent_seeder.layernorm.*", "nac.latent_seeder.layernorm.*"),
        (f"{graph}.latent_seeder.code_to_state_mu.*", "nac.latent_seeder.mean.*"),
        (f"{graph}.latent_seeder.code_to_state_logvar.*", "nac.latent_seeder.log_variance.*"),
        (f"{graph}.read_out.head.0.module.*", "classifier.layernorm.*"),
        *_modulated(f"{graph}.read_out.head.1", "classifier.projection"),
        # of a NAC that pools what the head gives, see `_convert`
        (f"{graph}.read_out.head.0.module.*", "latent_head.layernorm.*"),
        *_modulated(f"{graph}.read_out.head.1", "latent_head.projection"),
        ("output_tokenizer.confidence_scorer.*", "pooling.confidence.*"),
        ("output_tokenizer.to_logits.*", "classifier.*"),
    ]
    for latents in ("input_latents", "mediator_latents", "output_latents"):
        for name in ("codes", "signatures", "initial_states"):
            rows.append((f"{graph}.{latents}.{name}_", f"nac.{latents}.{name}"))
    rows += _part(f"{graph}.read_in", "nac.read_in", "read_in_attention")
    rows += _part(f"{graph}.propagators.#", "nac.layers.#", "latent_attention")
    return rows + _part(f"{graph}.read_out", "nac.read_out", "latent_attention")


_TABLE = NameTable(_rows())
# It adds the same to all scores of a latent, so no output depends on it, and our read-in does not have it.
_KEY_BIAS = "latent_graphs.0.read_in.read_in_attention.key_compiler.native_bias"


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
    converted, unknown = _convert(official, {name: name for name in official})
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
        `ConversionError`: names that are not part of this stage.
    """
    stitches, full_names = {}, {}
    for name, tensor in official.items():
        stitch = re.fullmatch(r"(pre|post)_stitch\.(weight|bias)", name)
        if stitch:
            stitches[f"{stitch[1]}.linear.{stitch[2]}"] = tensor
        else:
            full_names[name] = _full_name(name, index, num_stages)
    stage, unknown = _convert(official, full_names)
    _refuse(unknown, f"student of stage {index} of {num_stages} of a NAC")
    return stage, stitches


def nac_to_official(ours: Mapping[str, torch.Tensor], config: NACConfig) -> dict[str, torch.Tensor]:
    """
    The inverse of [`convert_nac`]. The bias of the read-in's keys, which ours does not have, is zero, and a learned
    bandwidth is what it counts as.

    Args:
        ours (`Mapping[str, torch.Tensor]`): State dict of the `NACForImageClassification`, on the meta device if only
            names and shapes matter.
        config (`NACConfig`): Of that model.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors by official names.

    Raises:
        `ConversionError`: names that are not part of a NAC.
    """
    official = {}
    for name, tensor in ours.items():
        theirs = _TABLE.official(name)
        if theirs is None:
            raise ConversionError(f"{name} of our NAC has no official counterpart.")
        if name.endswith("position_embeddings"):
            tensor = tensor[0]
        elif name.endswith("bandwidth") and (config.learnable_bandwidth or "read_out" in name):
            tensor = tensor.clamp(min=MIN_BANDWIDTH)
        official[theirs] = tensor
    if config.qkv_bias:
        official[_KEY_BIAS] = torch.zeros_like(ours["nac.read_in.attention.q_proj.bias"])
    if config.share_propagators:
        first = {name: tensor for name, tensor in official.items() if ".propagators.0." in name}
        for layer in range(1, config.num_hidden_layers):
            round_of = f".propagators.{layer}."
            official.update({name.replace(".propagators.0.", round_of): tensor for name, tensor in first.items()})
    return official


def nac_student_shapes(
    ours: Mapping[str, torch.Tensor], config: NACConfig, index: int, num_stages: int, stitch_size: int
) -> Shapes:
    """
    What an official student has to hold: the inverse of [`convert_nac_student`], shapes only. It has neither latents
    nor kernels.

    Args:
        ours (`Mapping[str, torch.Tensor]`): State dict of the whole `NACForImageClassification`.
        config (`NACConfig`): Of that model.
        index (`int`), num_stages (`int`): As in [`convert_nac_student`].
        stitch_size (`int`): Width of the meta model.

    Returns:
        `dict[str, tuple[int, ...]]`: Shapes by official names.
    """
    size = config.hidden_size
    shapes: Shapes = {}
    if index > 0:
        shapes.update({"pre_stitch.weight": (size, stitch_size), "pre_stitch.bias": (size,)})
    if index < num_stages - 1:
        shapes.update({"post_stitch.weight": (stitch_size, size), "post_stitch.bias": (stitch_size,)})
    for full_name, tensor in nac_to_official(ours, config).items():
        name = _student_name(full_name, index, num_stages)
        if name is not None and not full_name.endswith("kernel.bandwidth"):
            shapes[name] = tuple(tensor.shape)
    return shapes


def _convert(
    official: Mapping[str, torch.Tensor], full_names: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    converted, unknown = {}, []
    # a head that an output tokenizer follows does not give the logits
    is_pooled = any(full_name.startswith("output_tokenizer.") for full_name in full_names.values())
    for name, full_name in full_names.items():
        ours = _TABLE.ours(full_name)
        if ours is None:
            unknown.append(name)
        elif full_name != _KEY_BIAS:
            if is_pooled and ".read_out.head." in full_name:
                ours = ours.replace("classifier.", "latent_head.", 1)
            converted[ours] = official[name][None] if ours.endswith("position_embeddings") else official[name]
    return converted, unknown


def _prefixes(index: int, num_stages: int) -> dict[str, str]:
    """Names of a student's parts, and what the full model calls them; the most special come first."""
    if index == 0:
        return {"tokenizer.": "input_tokenizer.", "read_in.": "latent_graphs.0.read_in."}
    if index == num_stages - 1:
        return {"tokenizer.": "output_tokenizer.", "": "latent_graphs.0.read_out."}
    return {"": f"latent_graphs.0.propagators.{index - 1}."}


def _full_name(name: str, index: int, num_stages: int) -> str:
    for own, full in _prefixes(index, num_stages).items():
        if name.startswith(own):
            return full + name.removeprefix(own)
    return ""


def _student_name(full_name: str, index: int, num_stages: int) -> str | None:
    for own, full in _prefixes(index, num_stages).items():
        if full_name.startswith(full):
            return own + full_name.removeprefix(full)
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
        raise ConversionError(f"These tensors are not part of an official {what}: {sorted(unknown)}.")


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
_POOLINGS = {"gumbel": "gumbel", "gumbel-hard": "gumbel_hard", "vanilla": "softmax"}
_TOKENIZER_DEPTHS = {
    "tiny": [3, 3, 9],
    "mini": [3, 3, 6],
    "micro": [3, 3, 3],
    "nano": [1, 1, 1],
    "pico": [1, 1, 0],
    "femto": [1, 0, 0],
    "atto": [0, 0, 0],
}


def nac_config(kwargs: Mapping[str, Any], **overrides: Any) -> NACConfig:
    """
    The configuration of an official `NeuralCompiler`.

    Args:
        kwargs (`Mapping[str, Any]`): Its constructor's arguments: `model.kwargs` of an official YAML file.
        overrides: Fields of [`NACConfig`] that differ.

    Raises:
        `ConversionError`: an argument is not known, or has a value that no `NACConfig` expresses.
    """
    model = OfficialArguments(kwargs)
    num_labels, size = model.need("output_dim"), model.need("state_dim")
    fields: dict[str, Any] = {"num_channels": model.take("input_dim", 3), "hidden_size": size}
    # where the official trainer finds weights, not what the model is
    for name in ("simplified_interface", "student_state_dict_dir", "student_type"):
        model.take(name, None)
    model.require(input_tokenizer_type="ConvNeXtImageTokenizer", latent_graph_type="LatentGraph")
    model.require(predefined_states_dir=None, stitch_ckpt_path=None, stitch_dim=None)
    fields.update(_tokenizer_fields(model.section("input_tokenizer_kwargs"), size))
    graph = model.section("latent_graph_kwargs")
    graph.require(output_dim=num_labels)
    read_out = graph.section("read_out_kwargs")
    fields.update(_output_fields(model, "output_tokenizer", read_out, size, num_labels))
    fields.update(_graph_fields(graph, size))
    fields["read_out_residual"] = read_out.take("include_residual_in_latent_attention", True)
    fields["read_out_drop_path_rate"] = read_out.take("path_drop_prob", fields["drop_path_rate"])
    model.end()
    return NACConfig(**{**fields, **overrides})


def nac_students_config(
    share: Mapping[str, Any], roles: Mapping[str, Mapping[str, Any]], **overrides: Any
) -> NACConfig:
    """
    The configuration of a NAC whose stages are the official students of one configuration file.

    Args:
        share (`Mapping[str, Any]`): Its `share_kwargs`.
        roles (`Mapping[str, Mapping[str, Any]]`): Its sections `"readin"`, `"mediator"` and `"readout"`, or some.
        overrides: Fields of [`NACConfig`] that differ, e.g. `num_hidden_layers`.

    Raises:
        `ConversionError`: as [`nac_config`], or two roles differ in what a NAC has once.
    """
    fields: dict[str, Any] = {}
    for role, own in roles.items():
        for field, value in _student_fields(share, role, own).items():
            if fields.setdefault(field, value) != value:
                raise ConversionError(
                    f"`{role}` gives `{field}` as {value!r}, another role as {fields[field]!r}; a NAC has one."
                )
    return NACConfig(**{**fields, **overrides})


def _student_fields(share: Mapping[str, Any], role: str, own: Mapping[str, Any]) -> dict[str, Any]:
    shared, mine = OfficialArguments(share, "share_kwargs."), OfficialArguments(own, f"{role}.")
    fields: dict[str, Any] = {"hidden_size": shared.need("state_dim")}
    fields.update(_common_fields(shared, fields["hidden_size"]))
    fields["num_attention_heads"], fields["head_dim"] = mine.take("num_heads", 6), mine.take("head_dim", 64)
    rate = mine.take("path_drop_prob", 0.0)
    if role == "readin":
        fields["num_channels"] = mine.take("input_dim", 3)
        mine.require(tokenizer_type="ConvNeXtImageTokenizer")
        fields.update(_tokenizer_fields(mine.section("tokenizer_kwargs"), fields["hidden_size"]))
        fields["read_in_residual"] = mine.take("include_residual_in_read_in_attention", False)
        fields["read_in_drop_path_rate"] = rate
    elif role == "mediator":
        fields["drop_path_rate"] = rate
        fields["share_layernorm"] = mine.section("latent_attention_kwargs").take("share_layernorm", False)
    elif role == "readout":
        fields["read_out_drop_path_rate"] = rate
        fields["read_out_residual"] = mine.take("include_residual_in_latent_attention", False)
        fields.update(_output_fields(mine, "tokenizer", mine, fields["hidden_size"]))
    else:
        raise ConversionError(f"The role of a NAC student is 'readin', 'mediator' or 'readout', not {role!r}.")
    shared.end()
    mine.end()
    return fields


def _tokenizer_fields(arguments: OfficialArguments, hidden_size: int) -> dict[str, Any]:
    num_stages = arguments.take("num_stages", 3)
    depths = _known(arguments, "capacity_preset", "tiny", _TOKENIZER_DEPTHS)
    arguments.require(convnext_kwargs=None)
    grid = arguments.section("positional_grid_kwargs")
    size, grid_size = grid.take("dim", 0), grid.take("grid_size", [8, 8])
    stride = STEM_STRIDE * 2 ** (num_stages - 1)
    sizes = [stride * side for side in grid_size]
    return {
        "tokenizer_depths": depths[:num_stages],
        "tokenizer_hidden_sizes": [hidden_size // 4, hidden_size // 2, hidden_size][:num_stages],
        "position_embedding_size": size,
        "image_size": sizes[0] if sizes[0] == sizes[1] else sizes,
    }


def _output_fields(
    model: OfficialArguments, name: str, head: OfficialArguments, hidden_size: int, num_labels: int | None = None
) -> dict[str, Any]:
    """What becomes of the output latents: a head for each, then the output tokenizer that `model` calls `name`."""
    tokenizer, pooling = model.take(f"{name}_type", "FirstSlotAsLogits"), model.section(f"{name}_kwargs")
    has_head = head.take("use_head", True)
    if num_labels is None and (has_head or "output_dim" not in pooling.values):
        num_labels = head.need("output_dim")
    head_size = head.take("output_dim", num_labels)
    fields = {"head_layernorm": head.take("pre_output_layernorm", True), "latent_head_size": None}
    if tokenizer == "FirstSlotAsLogits":
        pooling.end()
        if not has_head:
            raise ConversionError(f"`{head.path}use_head` is False; with FirstSlotAsLogits it must be True.")
        return {**fields, "pooling": "first", "num_labels": head_size}
    if tokenizer != "OutputLatentPooling":
        raise ConversionError(f"`{model.path}{name}_type` {tokenizer!r} cannot be converted.")
    fields["pooling"] = _known(pooling, "softmax_type", "gumbel", _POOLINGS)
    fields["pooling_temperature"] = pooling.take("softmax_temperature", 1.0)
    given, taken = head_size if has_head else hidden_size, pooling.take("state_dim", hidden_size)
    if given != taken:
        raise ConversionError(
            f"`{head.path}use_head` is {has_head}, so the output tokenizer is given {given} channels, but its "
            f"`{pooling.path}state_dim` is {taken}. Both must be the same."
        )
    fields["latent_head_size"] = head_size if has_head else None
    fields["num_labels"] = pooling.take("output_dim", num_labels)
    return fields


def _known(arguments: OfficialArguments, name: str, default: Any, ours: Mapping[Any, Any]) -> Any:
    """What a table has for the value of an argument."""
    value = arguments.take(name, default)
    if value not in ours:
        known = sorted(key for key in ours if key is not None)
        raise ConversionError(f"`{arguments.path}{name}` is {value!r}; known are {known}.")
    return ours[value]


def _common_fields(arguments: OfficialArguments, hidden_size: int) -> dict[str, Any]:
    """What full model and students share."""
    fields = {
        "code_size": arguments.need("code_dim"),
        "layer_scale_init_value": arguments.take("layer_scale_initial_value", 1e-6),
        "use_geglu": arguments.take("use_geglu", False),
        "qkv_bias": arguments.take("qkv_bias_in_attention", True),
        "intermediate_size": round(arguments.take("ffn_capacity_factor", 1.0) * hidden_size),
    }
    arguments.require(mod_fc_cls="ModFC", ffn_mod_fc_cls=None, ffn_mod_fc_kwargs=None)
    modulation = arguments.section("mod_fc_kwargs")
    fields["code_scale_gain"] = modulation.take("scale_gain", 1.0)
    fields["learnable_code_scale_gain"] = modulation.take("learnable_scale_gain", False)
    fields["add_one_to_code_scale"] = modulation.take("add_one_to_scale", False)
    normalizations = {"ln": "layer_norm", **{name: name for name in ("l2", "sigmoid", "tanh", "none")}}
    fields["code_scale_normalization"] = _known(modulation, "scale_normalization_type", "ln", normalizations)
    modulation.require(scale_dropout=0.0, scale_times_input_normalization_type="none")
    return fields


def _graph_fields(graph: OfficialArguments, hidden_size: int) -> dict[str, Any]:
    rate = graph.take("path_drop_prob", 0.0)
    heads = {"num_attention_heads": graph.take("num_heads", 1), "head_dim": graph.take("head_dim", 64)}
    fields = {
        **_common_fields(graph, hidden_size),
        **heads,
        "signature_size": graph.need("signature_dim"),
        "num_input_latents": graph.need("num_input_latents"),
        "num_mediator_latents": graph.need("num_mediator_latents"),
        "num_output_latents": graph.need("num_output_latents"),
        "num_hidden_layers": graph.need("num_iterations"),
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
    graph.require(learnable_codes=True, share_ffn_between_propagators=False, propagator_layerwise_kwargs=None)
    graph.require(read_in_cls="AttentiveReadIn", input_latent_kwargs=None, output_latent_kwargs=None)
    graph.require(predefined_codes_dir=None, stitch_ckpt_path=None, stitch_dim=None, student_state_dict_dir=None)
    graph.require(state_dim=hidden_size)
    seeder = graph.section("latent_seeder_kwargs")
    fields["use_state_noise"] = seeder.take("use_state_noise", True)
    seeder.require(use_code_as_mean_state=False)
    fields.update(_prior_fields(graph.section("mediator_latent_kwargs"), fields["num_mediator_latents"]))
    read_in = graph.section("read_in_kwargs")
    read_in.require(num_heads=heads["num_attention_heads"], head_dim=heads["head_dim"])
    read_in.require(ffn_layer_scale_initial_value=fields["layer_scale_init_value"])
    fields["read_in_residual"] = read_in.take("include_residual_in_read_in_attention", False)
    fields["read_in_drop_path_rate"] = read_in.take("path_drop_prob", rate)
    fields["read_in_layer_scale_init_value"] = read_in.take("read_in_layer_scale_initial_value", 1.0)
    fields.update(_propagator_fields(graph.section("propagator_kwargs")))
    return fields


def _prior_fields(latents: OfficialArguments, num_latents: int) -> dict[str, Any]:
    prior = _known(latents, "graph_preset", None, {None: None, **_GRAPH_PRIORS})
    generator = dict(latents.take("graph_generator_kwargs", None) or {})
    latents.require(init_with_identical_codes=False)
    if generator.pop("n", num_latents) != num_latents:
        raise ConversionError(f"The graph's `n` is not the number of mediators, {num_latents}.")
    # the official fit has its truncation in the code
    truncation = {} if prior is None else {"graph_prior_truncation": 0.8}
    return {"graph_prior": prior, "graph_prior_kwargs": generator, **truncation}


def _propagator_fields(propagator: OfficialArguments) -> dict[str, Any]:
    attention = propagator.section("latent_attention_kwargs")
    propagator.require(include_residual_in_latent_attention=True)
    attention.require(kernel_type="DotProductKernel", mask_attn_scores_with_affinities=True)
    attention.require(scale_attention_by_affinities_after_softmax=False)
    # the softmax does not see it
    attention.take("normalize_kernel_along_keys", True)
    kernel = attention.section("kernel_kwargs")
    fields = {
        "share_layernorm": attention.take("share_layernorm", False),
        "kernel_truncation": kernel.take("truncation", None),
        "kernel_truncation_type": kernel.take("truncation_implementation", "direct"),
        "kernel_bandwidth": kernel.take("initial_bandwidth", 1.0),
        "learnable_bandwidth": kernel.take("learnable_bandwidth", True),
        "stochastic_kernel": kernel.take("stochastic_kernel", False),
        "kernel_temperature": kernel.take("stochastic_sampling_temperature", 1.0),
    }
    if fields["kernel_truncation_type"] == "masked":
        kernel.require(straight_through=True)
    # without an effect on the other type: what is cut has no gradient either way
    kernel.take("straight_through", True)
    kernel.require(use_gumbel_along_functions=False, stochastic_eval_behaviour="no_sample")
    return fields
