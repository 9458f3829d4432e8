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
"""PyTorch V-MoE model (arXiv 2106.05974), in the form used by m2mKD (arXiv 2402.16918)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.modeling.router_losses import balance_losses, has_balance_loss
from m2mkd.modeling.stitches import StitchLayer
from m2mkd.modeling.vmoe_embeddings import VMoEEmbeddings
from m2mkd.modeling.vmoe_experts import AnyWidthExpertsInterface
from m2mkd.modeling.vmoe_outputs import (
    VMoEBackboneOutput,
    VMoEImageClassifierOutput,
    VMoEModelOutput,
    dropped_fraction,
    mean_of_members,
)
from m2mkd.modeling.vmoe_routers import ROUTERS, VMoELinearRouter, VMoERouter, VMoESoftRouter


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention; the reference for every other backend."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class VMoEAttention(nn.Module):
    """Multi-head attention over all tokens, of the tokens themselves or of other queries."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # CODEPATH: Soft MoE's configurations normalize queries and keys, V-MoE's and m2mKD's do not
        if config.use_qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_states = hidden_states if query_states is None else query_states
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim))
            for states in (self.q_proj(query_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            self.q_norm(query).transpose(1, 2),
            self.k_norm(key).transpose(1, 2),
            value.transpose(1, 2),
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.flatten(-2).contiguous()), attn_weights


class VMoEMLP(nn.Module):
    """Dense feed-forward of a layer without experts."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


EXPERTS_INTERFACE = AnyWidthExpertsInterface()


@use_experts_implementation(experts_interface=EXPERTS_INTERFACE, has_gate=False, has_bias=True)
class VMoEExperts(nn.Module):
    """Two-layer perceptrons with stacked weights. `model.set_experts_implementation(...)` selects the backend."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.intermediate_size, config.hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(config.num_experts, config.intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Run one expert after the other (`experts_implementation="eager"`).

        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
            top_k_index (`torch.LongTensor` of shape `(num_tokens, num_experts_per_tok)`)
            top_k_weights (`torch.Tensor` of shape `(num_tokens, num_experts_per_tok)`)
        """
        output = torch.zeros_like(hidden_states)
        weights = (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias)
        # each unbound once: the gradient of an index would be a tensor of all experts, for each expert
        for expert, (up, up_bias, down, down_bias) in enumerate(zip(*weights, strict=True)):
            token, slot = torch.where(top_k_index == expert)
            hidden = F.linear(hidden_states[token], up, up_bias)
            hidden = F.linear(self.act_fn(hidden), down, down_bias)
            output.index_add_(0, token, (hidden * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    def forward_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Run every expert on as many rows of its own. With `"eager"` it is one product for all experts.

        Args:
            rows (`torch.Tensor` of shape `(num_groups, num_experts * num_rows, hidden_size)`): Of each group, the rows
                of the first expert, then those of the second one, and so on.
        """
        # with expert parallelism `self.num_experts` counts those of this process
        num_experts = self.config.num_experts
        groups = rows.unflatten(1, (num_experts, -1))
        hidden = groups.transpose(0, 1).flatten(1, 2)
        backend = EXPERTS_INTERFACE.get_interface(self.config._experts_implementation, None)
        if backend is not None or self._is_expert_parallel:
            expert = torch.arange(num_experts, device=rows.device).repeat_interleave(hidden.shape[1])[:, None]
            hidden = self(hidden.flatten(0, 1), expert, torch.ones_like(expert, dtype=rows.dtype))
            hidden = hidden.unflatten(0, (num_experts, -1))
        else:
            hidden = torch.baddbmm(self.up_proj_bias[:, None], hidden, self.up_proj.transpose(1, 2))
            hidden = torch.baddbmm(self.down_proj_bias[:, None], self.act_fn(hidden), self.down_proj.transpose(1, 2))
        return hidden.unflatten(1, (-1, groups.shape[2])).transpose(0, 1).flatten(1, 2)


class VMoESparseMLP(nn.Module):
    """Router and experts that replace the MLP of a layer."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.router = ROUTERS[config.router_type](config)
        self.experts = VMoEExperts(config)
        # returns what it gets; its output can be recorded
        self.dropped_mask = nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        groups = self.router.split_into_groups(hidden_states)
        outputs, dropped_mask = self.router.dispatch(self.experts, groups, self.router(groups))
        if dropped_mask is not None:
            self.dropped_mask(dropped_mask)
        return self.router.join_groups(outputs, hidden_states)


class VMoEDropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole images in training."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        mask = torch.rand(hidden_states.shape[0], 1, 1, dtype=hidden_states.dtype, device=hidden_states.device)
        return hidden_states / keep_prob * torch.floor(mask + keep_prob)


class VMoELayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer, dense or sparse."""

    def __init__(self, config: VMoEConfig, layer_idx: int):
        super().__init__()
        self.attention = VMoEAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # CODEPATH: m2mKD's checkpoints have experts in all layers, Google's in some
        self.mlp = VMoESparseMLP(config) if layer_idx in config.moe_layers else VMoEMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = VMoEDropPath(config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1))
        has_pre, has_post = layer_idx in config.pre_stitch_layers, layer_idx in config.post_stitch_layers
        self.pre_stitch = StitchLayer(config.stitch_size, config.hidden_size) if has_pre else None
        self.post_stitch = StitchLayer(config.hidden_size, config.stitch_size) if has_post else None
        is_first_sparse = layer_idx == min(config.moe_layers, default=None)
        self.num_copies = config.num_ensemble_members if is_first_sparse else 1

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        if self.pre_stitch is not None:
            hidden_states = self.pre_stitch(hidden_states)
        if self.num_copies > 1:
            hidden_states = hidden_states.repeat_interleave(self.num_copies, dim=0)
        attn_output, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attn_output))
        mlp_output = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.dropout(mlp_output))
        if self.post_stitch is not None:
            hidden_states = self.post_stitch(hidden_states)
        return hidden_states


class VMoEAttentionPooling(nn.Module):
    """Attention of one learned query over all tokens, and an MLP (`"map"`): `(batch_size, hidden_size)`."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = VMoEAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VMoEMLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        pooled, _ = self.attention(hidden_states, self.probe.expand(hidden_states.shape[0], -1, -1))
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class VMoEPooler(nn.Module):
    """
    What the classifier reads of the last hidden states, of shape `(batch_size, hidden_size)` or `(batch_size,
    representation_size)`.
    """

    def __init__(self, config: VMoEConfig):
        super().__init__()
        # CODEPATH: V-MoE's checkpoints read the class token, Soft MoE's configurations the mean of the patches
        self.reads_mean = config.classifier_pooling == "gap"
        # CODEPATH: configurations of google-research/vmoe with a "map" head
        self.attention_pooling = VMoEAttentionPooling(config) if config.classifier_pooling == "map" else None
        self.out_features = config.representation_size or config.hidden_size
        # CODEPATH: vmoe_s32_last2_ilsvrc2012 has a representation layer, its fine-tuned models have none
        has_pre_logits = config.representation_size is not None
        self.pre_logits = nn.Linear(config.hidden_size, self.out_features) if has_pre_logits else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.attention_pooling is not None:
            pooled = self.attention_pooling(hidden_states)
        else:
            pooled = hidden_states.mean(dim=1) if self.reads_mean else hidden_states[:, 0]
        return pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled))


# Options of a router that may change between two calls: none of them changes the shape of a parameter.
ROUTER_DIAL = (
    "capacity_factor",
    "expert_capacity",
    "capacity_multiple_of",
    "num_experts_per_tok",
    "batch_prioritized_routing",
    "router_group_size",
)


@auto_docstring
class VMoEPreTrainedModel(PreTrainedModel):
    config: VMoEConfig
    base_model_prefix = "vmoe"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VMoEEmbeddings", "VMoELayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": VMoELayer,
        "attentions": VMoEAttention,
        "router_logits": OutputRecorder(VMoERouter, index=0),
        "noisy_router_logits": OutputRecorder(VMoERouter, index=1),
        "dropped_mask": OutputRecorder(nn.Identity, layer_name="dropped_mask"),
    }
    _input_embed_layer = "patch_embeddings"

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The default is the plain product where every expert has as many rows, which makes it dense."""
        # CODEPATH: Google's V-MoE checkpoints have a capacity, m2mKD's have none
        is_dense = self.config.has_capacity or self.config.router_type == "soft"
        return super().get_correct_experts_implementation(
            "eager" if requested_experts is None and is_dense else requested_experts
        )

    # the values are those of the config, where they are read  # trf-ignore: TRF033
    def set_router(self, **options: Any) -> None:
        """
        Change how much is computed for each token, in place, without training.

        Args:
            options: `capacity_factor`, `expert_capacity`, `capacity_multiple_of`, `num_experts_per_tok`,
                `batch_prioritized_routing` and `router_group_size` of [`VMoEConfig`]. What is left out stays.

        Raises:
            `ValueError`: an option is not one of these.
            `StrictDataclassError`: an option breaks a rule of the config, which then stays as it was.

        Example:

        ```python
        >>> from m2mkd import VMoEConfig, VMoEForImageClassification

        >>> model = VMoEForImageClassification(VMoEConfig.from_preset("tiny"))
        >>> model.set_router(capacity_factor=0.5, num_experts_per_tok=1, batch_prioritized_routing=True)
        >>> model.config.num_experts_per_tok
        1

        ```"""
        unknown = sorted(options.keys() - set(ROUTER_DIAL))
        if unknown:
            raise ValueError(f"`set_router` cannot change {unknown}; it changes {', '.join(ROUTER_DIAL)}.")
        changed = copy.deepcopy(self.config)
        changed.update(options)
        changed.validate()
        self.config.update(options)
        maybe_install_capturing_hooks(self.base_model)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VMoEEmbeddings):
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, mean=0.0, std=std)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, mean=0.0, std=std)
        elif isinstance(module, VMoELinearRouter):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VMoESoftRouter):
            # the length of mu does not matter
            init.trunc_normal_(module.mu, mean=0.0, std=std)
            init.ones_(module.scale)
        elif isinstance(module, VMoEAttentionPooling):
            init.trunc_normal_(module.probe, mean=0.0, std=std)
        elif isinstance(module, VMoEExperts):
            # as in the dense MLP of a ViT; the experts of the official code start 50 times too small, because it takes
            # the fan-in of a 3-D weight
            init.trunc_normal_(module.up_proj, mean=0.0, std=std)
            init.zeros_(module.up_proj_bias)
            init.trunc_normal_(module.down_proj, mean=0.0, std=std)
            init.zeros_(module.down_proj_bias)


@auto_docstring(custom_intro="The bare V-MoE: hidden states of all tokens, without a head.")
class VMoEModel(VMoEPreTrainedModel):
    def __init__(self, config: VMoEConfig):
        super().__init__(config)
        self.embeddings = VMoEEmbeddings(config)
        self.layers = nn.ModuleList([VMoELayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VMoEModelOutput:
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return VMoEModelOutput(last_hidden_state=self.layernorm(hidden_states))


@auto_docstring(custom_intro="V-MoE with a linear classifier, by default on the class token.")
class VMoEForImageClassification(VMoEPreTrainedModel):
    def __init__(self, config: VMoEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.num_members = config.num_ensemble_members
        self.vmoe = VMoEModel(config)
        self.pooler = VMoEPooler(config)
        width = self.pooler.out_features
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()
        # CODEPATH: Google's V-MoE checkpoints drop tokens, which is recorded; torch.compile cannot install the hooks
        if config.has_capacity:
            maybe_install_capturing_hooks(self.vmoe)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VMoEImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Class indices from 0 to `num_labels - 1`.

        Example:

        ```python
        >>> import torch
        >>> from m2mkd import VMoEConfig, VMoEForImageClassification

        >>> model = VMoEForImageClassification(VMoEConfig.from_preset("tiny", num_labels=10)).eval()
        >>> outputs = model(torch.zeros(2, 3, 32, 32), output_router_logits=True)
        >>> list(outputs.logits.shape), list(outputs.router_logits[0].shape)
        ([2, 10], [34, 4])

        ```"""
        wants_router_logits = kwargs.pop("output_router_logits", None)
        if wants_router_logits is None:
            wants_router_logits = self.config.output_router_logits
        balanced = has_balance_loss(self.config)
        outputs: VMoEModelOutput = self.vmoe(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_router_logits=wants_router_logits or balanced,
            output_noisy_router_logits=balanced,
            output_dropped_mask=self.config.has_capacity,
            **kwargs,
        )
        logits = self.classifier(self.pooler(outputs.last_hidden_state))
        member_logits = None
        if self.num_members > 1:
            member_logits = logits.unflatten(0, (-1, self.num_members))
            logits = mean_of_members(member_logits)

        balance = {}
        if balanced:
            balance = balance_losses(outputs.router_logits, outputs.noisy_router_logits, self.config)
        loss = None
        if labels is not None:
            loss = self._label_loss(labels, logits, member_logits, **kwargs)
            if balanced:
                loss = loss + balance["aux_loss"]

        return VMoEImageClassifierOutput(
            loss=loss,
            logits=logits,
            **balance,
            dropped=dropped_fraction(outputs.dropped_mask) if outputs.dropped_mask else None,
            member_logits=member_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if wants_router_logits else None,
        )

    def _label_loss(
        self, labels: torch.Tensor, logits: torch.Tensor, member_logits: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        if member_logits is not None and self.training:
            # each member learns by itself
            labels, logits = labels.repeat_interleave(self.num_members, dim=0), member_logits.flatten(0, 1)
        return self.loss_function(labels, logits, self.config, **kwargs)


@auto_docstring(
    custom_intro="""
    V-MoE as the backbone of a dense-prediction model. Images may have any size, because the position embeddings are
    interpolated. The backbone does not compute the balance losses of the config; only the classifier does.
    """
)
class VMoEBackbone(BackboneMixin, VMoEPreTrainedModel):
    def __init__(self, config: VMoEConfig):
        super().__init__(config)
        if config.num_ensemble_members > 1:
            raise ValueError(
                f"`num_ensemble_members` is {config.num_ensemble_members}, but a backbone has one feature map for "
                "each image. Use `VMoEModel`, which returns the hidden states of every member."
            )
        self.vmoe = VMoEModel(config)
        self.is_stitched = [False, *(layer.post_stitch is not None for layer in self.vmoe.layers)]
        self.num_features = [config.stitch_size if stitched else config.hidden_size for stitched in self.is_stitched]
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> VMoEBackboneOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from m2mkd import VMoEBackbone, VMoEConfig

        >>> backbone = VMoEBackbone(VMoEConfig.from_preset("tiny", out_features=["stage2", "stage4"]))
        >>> [list(feature_map.shape) for feature_map in backbone(torch.zeros(1, 3, 64, 48)).feature_maps]
        [[1, 32, 8, 6], [1, 32, 8, 6]]

        ```"""
        outputs: VMoEModelOutput = self.vmoe(pixel_values, interpolate_pos_encoding=True, **kwargs)
        patch_height, patch_width = self.vmoe.embeddings.patch_embeddings.patch_size
        grid_size = (pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width)
        feature_maps = []
        for index in self.out_indices:
            hidden_states = outputs["hidden_states"][index][:, self.config.num_special_tokens :]
            if not self.is_stitched[index]:
                hidden_states = self.vmoe.layernorm(hidden_states)
            feature_maps.append(hidden_states.transpose(1, 2).unflatten(2, grid_size).contiguous())
        return VMoEBackboneOutput(
            feature_maps=tuple(feature_maps),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


__all__ = ["VMoEBackbone", "VMoEForImageClassification", "VMoEModel", "VMoEPreTrainedModel"]
