"""
Reads the cases in `vmoe_jax/`: what google-research/vmoe (942a78b) computes on tiny models, in JAX and float32. Names
are those of that code. What each option is compared with:

| option | cases |
|---|---|
| token choice: logits, top-k, weights of the full softmax, no noise | router_token_choice_det |
| noise on the logits; importance, load and GShard loss | router_token_choice_noisy, moe_block_vanilla_noisy |
| exact ties, of experts and of priorities | router_token_choice_ties |
| k = 1 and 3; capacity of a multiple of 1 | dispatch_token_choice_k1_k3 |
| capacity: table of roundings, given as a number, dropped choices, positions | dispatch_token_choice_k2 |
| batch prioritized routing | dispatch_token_choice_*, moe_block_bpr_det, model_vmoe_token (eval_bpr_cf05) |
| groups that span images or split them | moe_block_*, model_vmoe_token |
| bfloat16 at the experts (ours: float32; 1e-2) | moe_block_*_bf16*, moe_block_soft_slots1, model_*_bf16 |
| expert choice; rounding to even | moe_block_expert_choice_*, model_expert_choice_gap |
| soft: one slot, three slots and noise | moe_block_soft_*, model_soft_gap_no_bf16 |
| ensembles | ensemble_router_noisy, model_ensemble |
| head: class token, representation layer | model_vmoe_token |
| head: mean; oblong patches | model_vmoe_gap |
| head: attention pooling; normalized queries and keys; sin-cos positions | model_vmoe_map_qknorm_sincos |
| capacity factor and k changed after training | eval variants of model_* |
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from m2mkd import VMoEConfig


FOLDER = Path(__file__).parent / "vmoe_jax"
FORWARD_TOLERANCE = 1e-5  # of the largest value
GRADIENT_TOLERANCE = 1e-4  # relative norm
BFLOAT16_TOLERANCE = 1e-2  # one rounding to bfloat16 is 2^-8


class Case:
    """One folder: `case.config`, and the arrays of `case.inputs`, `case.params`, `case.outputs`."""

    def __init__(self, name: str):
        self.config: dict[str, Any] = json.loads((FOLDER / name / "config.json").read_text())
        self.inputs, self.params, self.outputs = (
            load_file(path) if (path := FOLDER / name / f"{part}.safetensors").exists() else {}
            for part in ("inputs", "params", "outputs")
        )

    def gradients(self, prefix: str) -> dict[str, torch.Tensor]:
        """Arrays whose name starts with `prefix`, without it."""
        return {name.removeprefix(prefix): v for name, v in self.outputs.items() if name.startswith(prefix)}


def names(folder: str) -> list[str]:
    """Names of the cases that start with `folder`."""
    return sorted(path.name for path in FOLDER.glob(f"{folder}*"))


def router_fields(router: Mapping[str, Any], num_layers: int = 1) -> dict[str, Any]:
    """Our options for a `router` section of that code. It adds up the losses of the layers, we average them."""
    dispatcher = router.get("dispatcher", {})
    kind = router.get("name", "NoisyTopExpertsPerItemRouter").rpartition(".")[2]
    fields = {"norm_topk_prob": False, "router_bias": False}
    if kind == "SoftRouter":
        return {**fields, "router_type": "soft", "router_noise_std": router.get("noise_std", 0.0)}
    fields |= {
        "router_noise_std": router.get("noise_std", 1.0),
        "capacity_factor": dispatcher.get("capacity_factor"),
        "expert_capacity": dispatcher.get("capacity"),
        "capacity_rounding": dispatcher.get("capacity_ceil_or_round", "ceil"),
        "capacity_multiple_of": dispatcher.get("capacity_multiple_of", 4),
    }
    if kind == "NoisyTopItemsPerExpertRouter":
        return {**fields, "router_type": "expert_choice"}
    return {
        **fields,
        "num_experts_per_tok": router["num_selected_experts"],
        "num_ensemble_members": router.get("ensemble_size", 1),
        "batch_prioritized_routing": dispatcher.get("batch_priority", False),
        "router_gshard_loss_coef": num_layers * router.get("gshard_loss_weight", 0.0),
        "router_importance_loss_coef": num_layers * router.get("importance_loss_weight", 1.0),
        "router_load_loss_coef": num_layers * router.get("load_loss_weight", 1.0),
    }


def model_config(model: Mapping[str, Any], params: Mapping[str, torch.Tensor], image_size: list[int]) -> VMoEConfig:
    """Our configuration for a `model` section of that code."""
    encoder = model["encoder"]
    moe = encoder["moe"]
    router = {"ensemble_size": moe.get("ensemble_size", 1), **moe["router"]}
    mu = [array for name, array in params.items() if name.endswith("Router/mu")]
    return VMoEConfig(
        hidden_size=model["hidden_size"],
        num_hidden_layers=encoder["num_layers"],
        num_attention_heads=encoder["num_heads"],
        intermediate_size=encoder["mlp_dim"],
        hidden_act="gelu_pytorch_tanh",
        image_size=image_size,
        patch_size=model["patch_size"],
        num_labels=model["num_classes"],
        classifier_pooling=model["classifier"],
        representation_size=model.get("representation_size"),
        use_qk_norm=encoder.get("attention_qk_norm", False),
        position_embedding_type=encoder.get("position_emb", {}).get("name", "learned"),
        moe_layers=moe["layers"],
        num_experts=moe["num_experts"],
        router_group_size=moe["group_size"],
        num_slots=mu[0].shape[-1] if mu else 1,
        **router_fields(router, len(moe["layers"])),
    )


RULES = [
    (r"^cls$", "vmoe.embeddings.cls_token"),
    (r"^embedding/", "vmoe.embeddings.patch_embeddings.projection/"),
    (r"^Encoder/posembed_input/pos_embedding$", "vmoe.embeddings.position_embeddings"),
    (r"^Encoder/encoder_norm/", "vmoe.layernorm/"),
    (r"^Encoder/encoderblock_(\d+)/", r"vmoe.layers.\1."),
    (r"^pre_logits/", "pooler.pre_logits/"),
    (r"^head/", "classifier/"),
    (r"^MapHead/MultiHeadDotProductAttention/", "pooler.attention_pooling.SelfAttention/"),
    (r"^MapHead/LayerNorm/", "pooler.attention_pooling.layernorm/"),
    (r"^MapHead/", "pooler.attention_pooling."),
    (r"LayerNorm_0/", "layernorm_before/"),
    (r"LayerNorm_1/", "layernorm_after/"),
    (r"SelfAttention/(q|k)[a-z]*_ln/", r"attention.\1_norm/"),
    (r"SelfAttention/(q|k|v|o)[a-z]*/", r"attention.\1_proj/"),
    (r"Moe/Router/dense/", "mlp.router/"),
    (r"Moe/Router/", "mlp.router."),
    (r"Moe/Mlp/Dense_0/", "mlp.experts.up_proj/"),
    (r"Moe/Mlp/Dense_1/", "mlp.experts.down_proj/"),
    (r"Mlp/Dense_0/", "mlp.fc1/"),
    (r"Mlp/Dense_1/", "mlp.fc2/"),
    (r"experts\.(up|down)_proj/kernel$", r"experts.\1_proj"),
    (r"experts\.(up|down)_proj/bias$", r"experts.\1_proj_bias"),
    (r"/(kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
]


def our_parameters(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arrays of a parameter tree by our names and in our layouts."""
    return {our_name(name): our_layout(name, array) for name, array in arrays.items()}


def our_name(name: str) -> str:
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def our_layout(name: str, array: torch.Tensor) -> torch.Tensor:
    if name == "embedding/kernel":
        return array.permute(3, 2, 0, 1)
    if name.endswith("Router/mu"):
        return array.permute(1, 2, 0)
    if name.endswith("Router/dense/kernel"):
        return array.flatten(1).T
    if name.endswith("_ln/scale"):
        return array
    if "Attention/" in name:
        if name.endswith("bias"):
            return array.flatten()
        return array.flatten(0, 1).T if "/out/" in name else array.flatten(1).T
    return array.mT if name.endswith("kernel") else array


@contextmanager
def given_noise(*noise: torch.Tensor) -> Iterator[None]:
    """Let the routers draw this noise, one array after the other."""
    arrays = iter(noise)
    with mock.patch.object(torch, "randn_like", lambda logits: next(arrays).reshape(logits.shape)):
        yield
    assert next(arrays, None) is None, "not all of the noise was drawn"


def member_noise(noise: torch.Tensor) -> torch.Tensor:
    """Noise of an ensemble, `(members, groups, tokens, experts)`, in the order of our tokens."""
    return noise.permute(1, 2, 0, 3).contiguous()


def assert_close(
    ours: torch.Tensor, theirs: torch.Tensor, what: str = "", tolerance: float = FORWARD_TOLERANCE
) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    error, scale = (ours.detach() - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * max(scale, 1e-3), f"{what}: off by {error:.2e}, largest value {scale:.2e}"


def assert_gradients_close(
    parameters: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float = GRADIENT_TOLERANCE
) -> None:
    """`theirs` by our names. A norm counts as at least a thousandth of the largest: below it there is rounding."""
    assert parameters.keys() == theirs.keys()
    largest = max(gradient.norm().item() for gradient in theirs.values())
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert gradient.shape == theirs[name].shape, name
        error, norm = (gradient - theirs[name]).norm().item(), theirs[name].norm().item()
        limit = tolerance * max(norm, 1e-3 * largest)
        assert error <= limit, f"{name}: off by {error:.2e} of norm {norm:.2e}, largest norm {largest:.2e}"
