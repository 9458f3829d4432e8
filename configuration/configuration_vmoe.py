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

from typing import Any

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


@auto_docstring(
    custom_intro="""
    Configuration of a V-MoE: a Vision Transformer in which some layers have a sparse mixture of experts instead of
    the MLP ([Scaling Vision with Sparse Mixture of Experts](https://huggingface.co/papers/2106.05974)). The defaults
    are V-MoE-Base as distilled in [m2mKD](https://huggingface.co/papers/2402.16918): 12 layers, all of them sparse,
    8 experts, top-2.
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
    num_experts_per_tok (`int`, *optional*, defaults to 2):
        Number of experts that each token is sent to.
    norm_topk_prob (`bool`, *optional*, defaults to `True`):
        Whether the weights of the selected experts are normalized among themselves (m2mKD), or taken from the softmax
        over all experts (the V-MoE paper, equation 1).
    router_noise_std (`float`, *optional*, defaults to 0.0):
        Standard deviation, in units of `1 / num_experts`, of the normal noise added to the router logits in training
        (V-MoE paper, section 2.2, uses 1.0; m2mKD uses none).
    router_importance_loss_coef (`float`, *optional*, defaults to 0.0):
        Weight of the importance loss (V-MoE paper, appendix A.2).
    router_load_loss_coef (`float`, *optional*, defaults to 0.0):
        Weight of the load loss (V-MoE paper, appendix A.3).
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
    ]

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
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    router_noise_std: float | int = 0.0
    router_importance_loss_coef: float | int = 0.0
    router_load_loss_coef: float | int = 0.0
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
        self._validate_layer_indices("moe_layers")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                "`num_experts >= num_experts_per_tok >= 1` is required, but `num_experts` is "
                f"{self.num_experts} and `num_experts_per_tok` is {self.num_experts_per_tok}."
            )
        for field in ("router_noise_std", "router_importance_loss_coef", "router_load_loss_coef"):
            if getattr(self, field) < 0:
                raise ValueError(f"`{field}` must not be negative, but is {getattr(self, field)}.")
        if self.router_load_loss_coef > 0 and self.router_noise_std == 0:
            raise ValueError(
                f"`router_load_loss_coef` is {self.router_load_loss_coef}, but `router_noise_std` is 0: the load loss "
                "uses the probability that an expert is selected when the router noise is drawn again. Set "
                "`router_noise_std` (the V-MoE paper uses 1.0), or use only `router_importance_loss_coef`."
            )

    def validate_stitches(self) -> None:
        """Check that stitches kept in the model have a width and are at existing layers."""
        self._validate_layer_indices("pre_stitch_layers")
        self._validate_layer_indices("post_stitch_layers")
        if (self.pre_stitch_layers or self.post_stitch_layers) and self.stitch_size is None:
            raise ValueError(
                f"`pre_stitch_layers` {self.pre_stitch_layers} and `post_stitch_layers` {self.post_stitch_layers} "
                "need `stitch_size`, the width outside the stitches."
            )

    def _validate_layer_indices(self, field: str) -> None:
        indices = getattr(self, field) or []
        if len(set(indices)) != len(indices) or any(not 0 <= i < self.num_hidden_layers for i in indices):
            raise ValueError(
                f"`{field}` must be different layer indices from 0 to {self.num_hidden_layers - 1} "
                f"(`num_hidden_layers` is {self.num_hidden_layers}), but is {indices}."
            )


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["VMOE_PRESETS", "VMoEConfig"]
