"""V-MoEs of google-research/vmoe (JAX) as ours: pure functions."""

import re
from collections.abc import Mapping
from typing import Any

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.conversion.jax_tree import array_of, converted_tree, transformer_fields, transformer_rows
from m2mkd.conversion.official_models import NameTable, OfficialArguments
from m2mkd.conversion.output import Tensors
from m2mkd.errors import ConversionError


_LAYER, _MOE = "vmoe.layers.#.mlp", "Encoder/encoderblock_#/Moe"
VMOE_JAX_TABLE = NameTable(
    [
        *transformer_rows("vmoe"),
        (f"{_MOE}/Router/dense/kernel", f"{_LAYER}.router.weight"),
        (f"{_MOE}/Mlp/Dense_0/kernel", f"{_LAYER}.experts.up_proj"),
        (f"{_MOE}/Mlp/Dense_0/bias", f"{_LAYER}.experts.up_proj_bias"),
        (f"{_MOE}/Mlp/Dense_1/kernel", f"{_LAYER}.experts.down_proj"),
        (f"{_MOE}/Mlp/Dense_1/bias", f"{_LAYER}.experts.down_proj_bias"),
    ]
)
# Arguments that change neither the weights nor what the model answers: of initialisation, dropout and devices.
_WITHOUT_EFFECT = {
    "": ("name", "head_bias_init", "head_kernel_zero_init", "deterministic"),
    "encoder": ("dropout_rate", "attention_dropout_rate"),
    "moe": ("dropout_rate", "split_rngs"),
    "router": (),
    "dispatcher": ("name", "partition_spec"),
}
# Section, argument and our field of what the arrays show: an argument that is given must agree.
_SEEN_IN_ARRAYS = [
    ("", "num_classes", "num_labels"),
    ("", "hidden_size", "hidden_size"),
    ("", "patch_size", "patch_size"),
    ("encoder", "num_layers", "num_hidden_layers"),
    ("encoder", "mlp_dim", "intermediate_size"),
    ("encoder", "num_heads", "num_attention_heads"),
    ("moe", "layers", "moe_layers"),
    ("moe", "num_experts", "num_experts"),
]
_ROUTER = re.compile(r"Encoder/encoderblock_(\d+)/Moe/Router/dense/kernel")


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
    if "cls" not in arrays:
        raise ConversionError('The tree has no `cls`: only classifier="token" can be converted, not "gap" or "map".')
    for name, why in (("pre_logits/kernel", "a representation layer"), ("MapHead/probe", "attention pooling")):
        if name in arrays:
            raise ConversionError(f"The tree has `{name}`, which is part of {why}. Our V-MoE does not support that.")
    arguments = OfficialArguments(model)
    encoder = arguments.section("encoder")
    moe = encoder.section("moe")
    router = moe.section("router")
    dispatcher = router.section("dispatcher")
    sections = {"": arguments, "encoder": encoder, "moe": moe, "router": router, "dispatcher": dispatcher}
    for name, section in sections.items():
        for argument in _WITHOUT_EFFECT[name]:
            section.take(argument, None)
    fields = transformer_fields(arrays, arguments)
    sparse = sorted(int(match[1]) for match in map(_ROUTER.fullmatch, arrays) if match)
    fields["moe_layers"] = sparse
    if sparse:
        kernel = array_of(arrays, f"Encoder/encoderblock_{sparse[0]}/Moe/Router/dense/kernel", 2)
        fields.update(
            num_experts=kernel.shape[1],
            num_experts_per_tok=router.take("num_selected_experts", 1),
            norm_topk_prob=False,
            router_noise_std=router.take("noise_std", 1.0),
            # they sum the losses of all layers, we average them
            router_importance_loss_coef=len(sparse) * router.take("importance_loss_weight", 1.0),
            router_load_loss_coef=len(sparse) * router.take("load_loss_weight", 1.0),
        )
    for section, argument, field in _SEEN_IN_ARRAYS:
        sections[section].agree(argument, fields[field])
    for section in sections.values():
        section.end()
    return VMoEConfig(**fields)


def convert_vmoe_jax(arrays: Tensors) -> Tensors:
    """
    Convert the arrays of a V-MoE of google-research/vmoe to the names and layouts of `VMoEForImageClassification`.
    Their routers have no bias; ours get zeros.

    Args:
        arrays (`dict[str, torch.Tensor]`): From [`read_parameters`]; emptied.

    Raises:
        `ConversionError`: some names do not belong to that code.
    """
    converted = converted_tree(arrays, VMOE_JAX_TABLE)
    routers = [name for name in converted if name.endswith(".router.weight")]
    for name in routers:
        converted[name.replace("weight", "bias")] = converted[name].new_zeros(converted[name].shape[0])
    return converted
