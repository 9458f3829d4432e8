"""V-MoEs of google-research/vmoe (JAX) as ours: pure functions."""

import re
from collections.abc import Mapping
from typing import Any

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.conversion.jax_tree import (
    POSITIONS,
    array_of,
    attention_rows,
    dense_rows,
    transformer_fields,
    transformer_rows,
)
from m2mkd.conversion.official_models import NameTable, OfficialArguments
from m2mkd.conversion.output import Tensors
from m2mkd.errors import ConversionError


_LAYER, _BLOCK, _POOLING = "vmoe.layers.#", "Encoder/encoderblock_#", "pooler.attention_pooling"
VMOE_JAX_TABLE = NameTable(
    [
        *transformer_rows("vmoe"),
        (f"{_BLOCK}/SelfAttention/query_ln/scale", f"{_LAYER}.attention.q_norm.weight"),
        (f"{_BLOCK}/SelfAttention/key_ln/scale", f"{_LAYER}.attention.k_norm.weight"),
        (f"{_BLOCK}/Moe/Router/dense/kernel", f"{_LAYER}.mlp.router.weight"),
        (f"{_BLOCK}/Moe/Router/mu", f"{_LAYER}.mlp.router.mu"),
        (f"{_BLOCK}/Moe/Router/scale", f"{_LAYER}.mlp.router.scale"),
        (f"{_BLOCK}/Moe/Mlp/Dense_0/kernel", f"{_LAYER}.mlp.experts.up_proj"),
        (f"{_BLOCK}/Moe/Mlp/Dense_0/bias", f"{_LAYER}.mlp.experts.up_proj_bias"),
        (f"{_BLOCK}/Moe/Mlp/Dense_1/kernel", f"{_LAYER}.mlp.experts.down_proj"),
        (f"{_BLOCK}/Moe/Mlp/Dense_1/bias", f"{_LAYER}.mlp.experts.down_proj_bias"),
        *dense_rows("pre_logits", "pooler.pre_logits"),
        ("MapHead/probe", f"{_POOLING}.probe"),
        ("MapHead/LayerNorm/scale", f"{_POOLING}.layernorm.weight"),
        ("MapHead/LayerNorm/bias", f"{_POOLING}.layernorm.bias"),
        ("MapHead/MultiHeadDotProductAttention/query_ln/scale", f"{_POOLING}.attention.q_norm.weight"),
        ("MapHead/MultiHeadDotProductAttention/key_ln/scale", f"{_POOLING}.attention.k_norm.weight"),
        *attention_rows("MapHead/MultiHeadDotProductAttention", f"{_POOLING}.attention"),
        *dense_rows("MapHead/Mlp/Dense_0", f"{_POOLING}.mlp.fc1"),
        *dense_rows("MapHead/Mlp/Dense_1", f"{_POOLING}.mlp.fc2"),
    ]
)
_ROUTER = re.compile(r"Encoder/encoderblock_(\d+)/Moe/Router/(?:dense/kernel|mu)")
# Their arguments, and for each our field and their default.
_TOKEN_CHOICE = {"num_selected_experts": ("num_experts_per_tok", 1), "noise_std": ("router_noise_std", 1.0)}
_EXPERT_CHOICE = {"noise_std": ("router_noise_std", 1.0)}
_SOFT = {"noise_std": ("router_noise_std", 0.0)}
_ROUTERS = {
    "NoisyTopExpertsPerItemRouter": ("token_choice", _TOKEN_CHOICE),
    "NoisyTopItemsPerExpertRouter": ("expert_choice", _EXPERT_CHOICE),
    "SoftRouter": ("soft", _SOFT),
}
_LOSSES = {
    "importance_loss_weight": ("router_importance_loss_coef", 1.0),
    "load_loss_weight": ("router_load_loss_coef", 1.0),
    "gshard_loss_weight": ("router_gshard_loss_coef", 0.0),
}
_DISPATCHER = {
    "capacity": ("expert_capacity", None),
    "capacity_factor": ("capacity_factor", None),
    "capacity_ceil_or_round": ("capacity_rounding", "ceil"),
    "capacity_multiple_of": ("capacity_multiple_of", 4),
    "batch_priority": ("batch_prioritized_routing", False),
}
# Section, argument and our field of what the arrays show: an argument that is given must agree.
_SEEN_IN_ARRAYS = [
    ("model", "num_classes", "num_labels"),
    ("model", "hidden_size", "hidden_size"),
    ("model", "patch_size", "patch_size"),
    ("model", "representation_size", "representation_size"),
    ("encoder", "num_layers", "num_hidden_layers"),
    ("encoder", "mlp_dim", "intermediate_size"),
    ("encoder", "num_heads", "num_attention_heads"),
    ("encoder", "attention_qk_norm", "use_qk_norm"),
    ("moe", "layers", "moe_layers"),
    ("moe", "num_experts", "num_experts"),
    ("moe", "ensemble_size", "num_ensemble_members"),
    ("router", "num_slots", "num_slots"),
]
_POOLINGS = {"gap": "gap", "0": "first"}
# Arguments of initialisation, dropout, devices and metrics; they change neither the weights nor the answers.
# The experts' inputs and outputs, which that code can round to bfloat16, have the model's dtype.
_WITHOUT_EFFECT = {
    "model": ("name", "head_bias_init", "head_kernel_zero_init", "deterministic"),
    "encoder": ("dropout_rate", "attention_dropout_rate", "dtype"),
    "moe": ("dropout_rate", "split_rngs"),
    "router": ("deterministic", "dtype", "compute_similarity_metrics", "partition_spec", "precision"),
    "dispatcher": ("name", "bfloat16", "partition_spec", "einsum_precision"),
}


def model_section(content: Mapping[str, Any]) -> dict[str, Any]:
    """
    The `model` section of that code's configuration.

    Args:
        content (`Mapping[str, Any]`): A configuration with a `model`, this section itself, or only the arguments of
            the routers. `image_size` may stand beside them.

    Raises:
        `ConversionError`: it is none of these.
    """
    size = {name: content[name] for name in ("image_size",) if name in content}
    if "model" in content:
        return {**OfficialArguments(content).section("model").values, **size}
    if "encoder" in content:
        return dict(content)
    router = OfficialArguments({name: value for name, value in content.items() if name not in size})
    # without its own arguments, a router adds no noise and has no loss
    quiet = {"noise_std": 0.0, "importance_loss_weight": 0.0, "load_loss_weight": 0.0}
    chosen = {"num_selected_experts": router.need("num_selected_experts")}
    return {**size, "encoder": {"moe": {"router": {**quiet, **router.values, **chosen}}}}


def vmoe_jax_config(arrays: Tensors, model: Mapping[str, Any]) -> VMoEConfig:
    """
    Build the configuration of a V-MoE of google-research/vmoe: sizes come from the arrays, how the routers choose from
    the `model` section of its configuration.

    Args:
        arrays (`dict[str, torch.Tensor]`): From [`read_parameters`].
        model (`Mapping[str, Any]`): From [`model_section`], or of [`PUBLISHED`].

    Raises:
        `ConversionError`: our V-MoE cannot express the model, `model` is of another one, or an argument is not known.
    """
    arguments = OfficialArguments(model)
    encoder = arguments.section("encoder")
    moe, position = encoder.section("moe"), encoder.section("position_emb")
    router = moe.section("router")
    dispatcher = router.section("dispatcher")
    sections = {"model": arguments, "encoder": encoder, "moe": moe, "router": router, "dispatcher": dispatcher}
    for name, names in _WITHOUT_EFFECT.items():
        for argument in names:
            sections[name].take(argument, None)
    fields = transformer_fields(arrays, arguments)
    fields.update(
        classifier_pooling=_pooling(arrays, arguments),
        representation_size=array_of(arrays, "pre_logits/bias", 1).shape[0] if "pre_logits/bias" in arrays else None,
        use_qk_norm="Encoder/encoderblock_0/SelfAttention/query_ln/scale" in arrays,
        position_embedding_type=_position_embedding_type(arrays, position),
        moe_layers=sorted(int(match[1]) for match in map(_ROUTER.fullmatch, arrays) if match),
    )
    if fields["moe_layers"]:
        fields.update(_router_fields(arrays, fields["moe_layers"], moe, router, dispatcher))
    for name, argument, field in _SEEN_IN_ARRAYS:
        if field in fields:
            sections[name].agree(argument, fields[field])
    for section in (*sections.values(), position):
        section.end()
    return VMoEConfig(**fields)


def _pooling(arrays: Tensors, arguments: OfficialArguments) -> str:
    for name, pooling in (("cls", "token"), ("MapHead/probe", "map")):
        if name in arrays:
            arguments.agree("classifier", pooling)
            return pooling
    classifier = arguments.need("classifier")
    if classifier not in _POOLINGS:
        raise ConversionError(
            f"`classifier` is {classifier!r}, but the tree has neither `cls` nor `MapHead`: it must be one of "
            f"{list(_POOLINGS)}."
        )
    return _POOLINGS[classifier]


def _position_embedding_type(arrays: Tensors, position: OfficialArguments) -> str:
    if POSITIONS in arrays:
        position.agree("name", "learned")
        return "learned"
    name = position.need("name")
    if name != "sincos2d":
        raise ConversionError(
            f"`{position.path}name` is {name!r}, but the tree has no `{POSITIONS}`: it must be 'sincos2d'."
        )
    position.require(temperature=10000)
    return "sincos2d"


def _router_fields(
    arrays: Tensors,
    layers: list[int],
    moe: OfficialArguments,
    router: OfficialArguments,
    dispatcher: OfficialArguments,
) -> dict[str, Any]:
    name = router.take("name", "NoisyTopExpertsPerItemRouter")
    if name.rpartition(".")[2] not in _ROUTERS:
        raise ConversionError(f"`{router.path}name` is {name!r}; it must be one of {list(_ROUTERS)}.")
    router_type, table = _ROUTERS[name.rpartition(".")[2]]
    first = f"Encoder/encoderblock_{layers[0]}/Moe"
    fields = {
        "router_type": router_type,
        "num_experts": array_of(arrays, f"{first}/Mlp/Dense_0/kernel", 3).shape[0],
        "norm_topk_prob": False,
        "router_bias": False,
        "router_group_size": moe.take("group_size", None),
        **{field: router.take(argument, default) for argument, (field, default) in table.items()},
    }
    if router_type == "soft":
        # the slots were counted when mu was made
        router.take("capacity_factor", None)
        return {**fields, "num_slots": array_of(arrays, f"{first}/Router/mu", 3).shape[2]}
    fields.update({field: dispatcher.take(argument, default) for argument, (field, default) in _DISPATCHER.items()})
    fields["capacity_multiple_of"] = fields["capacity_multiple_of"] or None
    if router_type == "token_choice":
        gate = array_of(arrays, f"{first}/Router/dense/kernel")
        # before it is fine-tuned, an ensemble may have the gate of one model
        fields["num_ensemble_members"] = gate.shape[1] if gate.ndim == 3 else moe.take("ensemble_size", 1)
        for argument, (field, default) in _LOSSES.items():
            # they sum the losses of all layers, we average them
            fields[field] = len(layers) * router.take(argument, default)
        if fields["router_noise_std"] == 0:
            # there is none there without noise
            fields["router_load_loss_coef"] = 0.0
    return fields
