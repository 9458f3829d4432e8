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
"""V-MoE model configuration."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import auto_docstring


# The sizes of m2mKD (arXiv 2402.16918, section 4 and its code): ViT sizes with 8 experts (top-2) instead of every MLP.
VMOE_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_experts": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "huge": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "patch_size": 14,
    },
}

_LOSSES = ("router_importance_loss_coef", "router_load_loss_coef", "router_gshard_loss_coef")


@auto_docstring(
    custom_intro="""
    Configuration of a V-MoE: a Vision Transformer in which some layers have a sparse mixture of experts instead of
    the MLP ([Scaling Vision with Sparse Mixture of Experts](https://huggingface.co/papers/2106.05974)). The defaults
    are V-MoE-Base as distilled in [m2mKD](https://huggingface.co/papers/2402.16918): 12 layers, all of them sparse,
    8 experts, top-2.

    Processes that `torchrun` starts can share a model, by `distributed_config=DistributedConfig(...)` in
    `from_pretrained`: `tp_size` (attention and dense MLPs) or `fsdp_size` (shards of everything), and with it
    `ep_size` (whole experts; it must divide `num_experts`). Limits of transformers 5.23 and torch: `ep_size` without
    `tp_size` or `fsdp_size` is refused; a `Trainer` saves no optimizer for such a model and asks for
    `save_only_model=True`; FSDP2 refuses the scalar parameter of `router_type="soft"`.
    """
)
@strict
class VMoEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    drop_path_rate (`float`, *optional*, defaults to 0.0):
        Stochastic depth rate of the last layer; the rate grows linearly from 0 at the first layer.
    moe_layers (`list[int]`, *optional*):
        Indices of the layers that have experts instead of an MLP. `None` means every layer; `[]` is a plain ViT.
    num_experts (`int`, *optional*, defaults to 8):
        Number of experts in each sparse layer.
    router_type (`str`, *optional*, defaults to `"token_choice"`):
        `"token_choice"`: each token chooses experts (V-MoE). `"expert_choice"`: each expert chooses tokens of the
        group ([Expert Choice Routing](https://huggingface.co/papers/2202.09368)). `"soft"`: each expert gets weighted
        means of all tokens of the group ([Soft MoE](https://huggingface.co/papers/2308.00951)).
    num_experts_per_tok (`int`, *optional*, defaults to 2):
        Number of experts that each token is sent to (token choice).
    norm_topk_prob (`bool`, *optional*, defaults to `True`):
        Whether the weights of the selected experts are normalized among themselves (m2mKD), or taken from the softmax
        over all experts (the V-MoE paper, equation 1).
    router_group_size (`int`, *optional*):
        Number of consecutive tokens of the batch that are routed together; it must divide the tokens of a batch.
        `None`: the tokens of one image where tokens compete for the experts, so that the logits of an image do not
        depend on the others; all tokens of the batch for token choice without a capacity.
    capacity_factor (`float`, *optional*):
        Room of an expert for the tokens of a group, as a multiple of its share: `num_experts_per_tok * group_size /
        num_experts` for token choice (V-MoE paper, section 2.3), `group_size / num_experts` for expert choice. Token
        choice drops what is over it; `None` is no limit.
    expert_capacity (`int`, *optional*):
        The same room in tokens, instead of `capacity_factor`.
    capacity_rounding (`str`, *optional*, defaults to `"ceil"`):
        How the room is made a whole number, `"ceil"` or `"round"` (to even).
    capacity_multiple_of (`int`, *optional*, defaults to 4):
        The whole number is raised to a multiple of this. `None` leaves it.
    batch_prioritized_routing (`bool`, *optional*, defaults to `False`):
        Whether the tokens with the largest weights, instead of the first ones, get the room (V-MoE paper, section 4).
    num_slots (`int`, *optional*, defaults to 1):
        Number of slots of each expert (soft).
    router_bias (`bool`, *optional*, defaults to `True`):
        Whether the router has a bias, as in m2mKD; the routers of google-research/vmoe have none (token and expert
        choice).
    num_ensemble_members (`int`, *optional*, defaults to 1):
        Number of members of an efficient ensemble of experts ([E3](https://huggingface.co/papers/2110.03360)): the
        tokens are repeated at the first sparse layer, and each member has its own part of the experts.
    router_noise_std (`float`, *optional*, defaults to 0.0):
        Standard deviation, in units of `1 / num_experts` (of a member's experts in an ensemble; in units of 1 for
        soft), of the normal noise added to the router logits in training (V-MoE paper, section 2.2, uses 1.0; m2mKD
        uses none).
    router_importance_loss_coef (`float`, *optional*, defaults to 0.0):
        Weight of the importance loss (V-MoE paper, appendix A.2).
    router_load_loss_coef (`float`, *optional*, defaults to 0.0):
        Weight of the load loss (V-MoE paper, appendix A.3).
    router_gshard_loss_coef (`float`, *optional*, defaults to 0.0):
        Weight of the balance loss of [GShard](https://huggingface.co/papers/2006.16668).
    classifier_pooling (`str`, *optional*, defaults to `"token"`):
        What the classifier reads: `"token"` (the class token), `"gap"` (the mean of the patches), `"map"` (attention
        pooling) or `"first"` (the first patch). Only `"token"` adds a class token.
    representation_size (`int`, *optional*):
        Width of a dense layer with tanh before the classifier (`pre_logits`). `None`: no such layer.
    use_qk_norm (`bool`, *optional*, defaults to `False`):
        Whether queries and keys are normalized in each head, by a layer norm without bias.
    position_embedding_type (`str`, *optional*, defaults to `"learned"`):
        `"learned"`, or `"sincos2d"`: fixed sines and cosines of the patch's row and column.
    stitch_size (`int`, *optional*):
        Width of the hidden states outside the stitch layers, for a model that keeps stitch layers (a student
        fine-tuned with the stitches of its distillation). `None`: the model has no stitch layers.
    pre_stitch_layers (`list[int]`, *optional*):
        Indices of the layers before which a stitch maps `stitch_size` to `hidden_size`.
    post_stitch_layers (`list[int]`, *optional*):
        Indices of the layers after which a stitch maps `hidden_size` to `stitch_size`.
    output_router_logits (`bool`, *optional*, defaults to `False`):
        Whether the model returns the router logits of its sparse layers.
    out_features (`list[str]`, *optional*):
        Stages whose feature maps [`VMoEBackbone`] returns, in their order: `"stem"` (the embeddings), `"stage1"` (the
        first layer), and so on. `None` means the last stage.
    out_indices (`list[int]`, *optional*):
        Indices of the same stages: 0 is the stem, -1 the last stage.

    Example:

    ```python
    >>> from m2mkd import VMoEConfig, VMoEForImageClassification

    >>> config = VMoEConfig.from_preset("tiny", moe_layers=[1, 3], num_labels=10)
    >>> model = VMoEForImageClassification(config)
    >>> model.config.num_experts
    4

    ```"""

    model_type = "vmoe"
    attribute_map = {"num_local_experts": "num_experts"}
    keys_to_ignore_at_inference = [
        "hidden_states",
        "attentions",
        "router_logits",
        "aux_loss",
        "importance_loss",
        "load_loss",
        "gshard_loss",
        "dropped",
        "member_logits",
    ]
    # the experts are split by expert only: the sum of split experts would add the bias of `down_proj` once a process
    base_model_tp_plan = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.q_norm": "replicated_with_grad_allreduce",
        "layers.*.attention.k_norm": "replicated_with_grad_allreduce",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
        "layers.*.mlp.experts.up_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "layernorm": "keep_full_weight",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    moe_layers: list[int] | None = None
    num_experts: int = 8
    router_type: Literal["token_choice", "expert_choice", "soft"] = "token_choice"
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    router_group_size: int | None = None
    capacity_factor: float | int | None = None
    expert_capacity: int | None = None
    capacity_rounding: Literal["ceil", "round"] = "ceil"
    capacity_multiple_of: int | None = 4
    batch_prioritized_routing: bool = False
    num_slots: int = 1
    router_bias: bool = True
    num_ensemble_members: int = 1
    router_noise_std: float | int = 0.0
    router_importance_loss_coef: float | int = 0.0
    router_load_loss_coef: float | int = 0.0
    router_gshard_loss_coef: float | int = 0.0
    classifier_pooling: Literal["token", "first", "gap", "map"] = "token"
    representation_size: int | None = None
    use_qk_norm: bool = False
    position_embedding_type: Literal["learned", "sincos2d"] = "learned"
    stitch_size: int | None = None
    pre_stitch_layers: list[int] | None = None
    post_stitch_layers: list[int] | None = None
    output_router_logits: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.moe_layers is None:
            self.moe_layers = list(range(self.num_hidden_layers))
        self.pre_stitch_layers = self.pre_stitch_layers or []
        self.post_stitch_layers = self.post_stitch_layers or []
        self.stage_names = ["stem"] + [f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VMoEConfig":
        """
        Create a configuration of a known size: `"tiny"` (for tests and laptops), `"base"`, `"large"` or `"huge"`.

        Args:
            name (`str`): Name of the preset.
            overrides: Fields that differ from the preset, e.g. `num_labels=10`.

        Raises:
            `ValueError`: there is no preset with this name.
        """
        if name not in VMOE_PRESETS:
            raise ValueError(f"There is no V-MoE preset '{name}'; choose one of {sorted(VMOE_PRESETS)}.")
        return cls(**{**VMOE_PRESETS[name], **overrides})

    @property
    def num_special_tokens(self) -> int:
        """Number of tokens before the patches."""
        return int(self.classifier_pooling == "token")

    @property
    def has_capacity(self) -> bool:
        """Whether the experts have a limited room for tokens."""
        return self.capacity_factor is not None or self.expert_capacity is not None

    def validate_sizes(self) -> None:
        """Check the sizes that must be positive or divide each other."""
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, but is {getattr(self, field)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`, but {self.hidden_size} is not a multiple "
                f"of {self.num_attention_heads}."
            )
        for size, patch in zip(_pair(self.image_size), _pair(self.patch_size), strict=True):
            if size < 1 or patch < 1 or size % patch:
                raise ValueError(
                    f"`image_size` must be a positive multiple of `patch_size`, but is {self.image_size} with "
                    f"`patch_size` {self.patch_size}: whole patches would not cover the image."
                )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must be in [0, 1), but is {self.drop_path_rate}.")

    def validate_experts(self) -> None:
        """Check the indices of the sparse layers and the routing in them."""
        _check_layer_indices(self, "moe_layers")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                "`num_experts >= num_experts_per_tok >= 1` is required, but `num_experts` is "
                f"{self.num_experts} and `num_experts_per_tok` is {self.num_experts_per_tok}."
            )
        for field in ("router_noise_std", *_LOSSES):
            if getattr(self, field) < 0:
                raise ValueError(f"`{field}` must not be negative, but is {getattr(self, field)}.")
        if self.router_load_loss_coef > 0 and self.router_noise_std == 0:
            raise ValueError(
                f"`router_load_loss_coef` is {self.router_load_loss_coef}, but `router_noise_std` is 0: the load loss "
                "uses the probability that an expert is selected when the router noise is drawn again. Set "
                "`router_noise_std` (the V-MoE paper uses 1.0), or use only `router_importance_loss_coef`."
            )

    def validate_router(self) -> None:
        """Check the room of the experts, and that the options belong to the router."""
        for field in ("router_group_size", "capacity_factor", "expert_capacity", "capacity_multiple_of"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ValueError(f"`{field}` must be positive, but is {value}. `None` leaves it out.")
        if self.capacity_factor is not None and self.expert_capacity is not None:
            raise ValueError(
                f"`capacity_factor` {self.capacity_factor} and `expert_capacity` {self.expert_capacity} are both "
                "given, but say the same thing in two ways. Set one of them to `None`."
            )
        if self.num_slots < 1:
            raise ValueError(f"`num_slots` must be at least 1, but is {self.num_slots}.")
        if self.router_type == "soft" and self.has_capacity:
            raise ValueError(
                "`router_type` 'soft' has slots in place of a capacity, but `capacity_factor` is "
                f"{self.capacity_factor} and `expert_capacity` {self.expert_capacity}. Set `num_slots`."
            )
        if self.router_type == "expert_choice" and not self.has_capacity:
            raise ValueError(
                "`router_type` 'expert_choice' needs `capacity_factor` (or `expert_capacity`), the number of tokens "
                "that an expert takes. The Expert Choice paper uses 2."
            )
        if self.batch_prioritized_routing and not (self.router_type == "token_choice" and self.has_capacity):
            raise ValueError(
                "`batch_prioritized_routing` decides which tokens get the limited room of token choice, but "
                f"`router_type` is '{self.router_type}', `capacity_factor` {self.capacity_factor} and "
                f"`expert_capacity` {self.expert_capacity}. Set `capacity_factor`, or leave it off."
            )
        for field in _LOSSES:
            if getattr(self, field) > 0 and self.router_type != "token_choice":
                raise ValueError(
                    f"`{field}` is {getattr(self, field)}, but balances the choices of tokens, and `router_type` "
                    f"'{self.router_type}' gives every expert the same load. Set it to 0."
                )

    def validate_ensemble(self) -> None:
        """Check that the members of an ensemble have experts of their own, and enough of them."""
        members = self.num_ensemble_members
        if members < 1 or self.num_experts % members:
            raise ValueError(
                f"`num_ensemble_members` must be at least 1 and divide `num_experts` {self.num_experts}, but is "
                f"{members}."
            )
        if members == 1:
            return
        if self.router_type != "token_choice" or not self.moe_layers:
            raise ValueError(
                f"`num_ensemble_members` {members} needs `router_type` 'token_choice' and a sparse layer, but "
                f"`router_type` is '{self.router_type}' and `moe_layers` {self.moe_layers}."
            )
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"`num_ensemble_members` {members} averages the members' softmax over the classes, but `problem_type` "
                f"is '{self.problem_type}'. Set it to 'single_label_classification', or use one member."
            )
        if self.num_experts_per_tok > self.num_experts // members:
            raise ValueError(
                f"`num_experts_per_tok` is {self.num_experts_per_tok}, but each of the {members} members "
                f"(`num_ensemble_members`) has only {self.num_experts // members} of the {self.num_experts} experts."
            )
        if self.router_group_size is not None and self.router_group_size % members:
            raise ValueError(
                f"`router_group_size` must be a multiple of `num_ensemble_members` {members}, but is "
                f"{self.router_group_size}."
            )

    def validate_head(self) -> None:
        """Check the sizes of the head and of the position embeddings."""
        if self.representation_size is not None and self.representation_size < 1:
            raise ValueError(
                f"`representation_size` must be at least 1, but is {self.representation_size}. `None` leaves it out."
            )
        if self.position_embedding_type == "sincos2d" and (self.hidden_size % 4 or self.hidden_size < 8):
            raise ValueError(
                "`position_embedding_type` 'sincos2d' needs a `hidden_size` that is a multiple of 4 and at least 8, "
                f"but it is {self.hidden_size}."
            )

    def validate_stitches(self) -> None:
        """Check that stitches kept in the model have a width and are at existing layers."""
        _check_layer_indices(self, "pre_stitch_layers")
        _check_layer_indices(self, "post_stitch_layers")
        if (self.pre_stitch_layers or self.post_stitch_layers) and self.stitch_size is None:
            raise ValueError(
                f"`pre_stitch_layers` {self.pre_stitch_layers} and `post_stitch_layers` {self.post_stitch_layers} "
                "need `stitch_size`, the width outside the stitches."
            )


def _check_layer_indices(config: VMoEConfig, field: str) -> None:
    indices = getattr(config, field) or []
    if len(set(indices)) != len(indices) or any(not 0 <= i < config.num_hidden_layers for i in indices):
        raise ValueError(
            f"`{field}` must be different layer indices from 0 to {config.num_hidden_layers - 1} "
            f"(`num_hidden_layers` is {config.num_hidden_layers}), but is {indices}."
        )


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["VMOE_PRESETS", "VMoEConfig"]
