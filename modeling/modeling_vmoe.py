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

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.modeling.router_losses import importance_loss, load_loss
from m2mkd.modeling.stitches import StitchLayer
from m2mkd.modeling.vmoe_experts import AnyWidthExpertsInterface


@auto_docstring(custom_intro="Output of [`VMoEModel`].")
@dataclass
class VMoEModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_patches + 1, hidden_size)`):
        Hidden states after the final layer norm; the class token comes first.
    router_logits (`tuple(torch.FloatTensor)`, returned with `output_router_logits=True`):
        One tensor of shape `(batch_size * (num_patches + 1), num_experts)` per sparse layer, before any router noise.
    noisy_router_logits (`tuple(torch.FloatTensor)`, returned with `output_noisy_router_logits=True`):
        Logits after the router noise, which selected the experts.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    noisy_router_logits: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`VMoEForImageClassification`].")
@dataclass
class VMoEImageClassifierOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, returned when `labels` is given):
        Cross entropy, plus `aux_loss` if there is one.
    logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
        Classification scores before the softmax.
    aux_loss (`torch.FloatTensor` of shape `()`, returned if the config gives a balance loss a weight):
        Weighted sum of `importance_loss` and `load_loss`, averaged over the sparse layers.
    importance_loss (`torch.FloatTensor` of shape `()`, returned with `aux_loss`):
        Unweighted importance loss, averaged over the sparse layers.
    load_loss (`torch.FloatTensor` of shape `()`, returned with `aux_loss` if the config gives it a weight):
        Unweighted load loss, averaged over the sparse layers.
    router_logits (`tuple(torch.FloatTensor)`, returned with `output_router_logits=True`):
        One tensor of shape `(batch_size * (num_patches + 1), num_experts)` per sparse layer.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    importance_loss: torch.FloatTensor | None = None
    load_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`VMoEBackbone`].")
@dataclass
class VMoEBackboneOutput(BackboneOutput):
    r"""
    feature_maps (`tuple(torch.FloatTensor)`):
        For each of `out_features`, the hidden states of the patches after the final layer norm, of shape
        `(batch_size, hidden_size, height / patch_size, width / patch_size)`. The feature map of a stage that ends in a
        stitch has the width of the stitch and no layer norm.
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_patches + 1, hidden_size)`):
        As in [`VMoEModelOutput`].
    router_logits (`tuple(torch.FloatTensor)`, returned with `output_router_logits=True`):
        As in [`VMoEModelOutput`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


class VMoEPatchEmbeddings(nn.Module):
    """Patch embedding from `(batch_size, num_channels, height, width)` to `(batch_size, num_patches, hidden_size)`."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        image_size, patch_size = config.image_size, config.patch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        self.grid_size = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` have {pixel_values.shape[1]} channels, but the model's `num_channels` is "
                f"{self.num_channels}."
            )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class VMoEEmbeddings(nn.Module):
    """Class token, patches and position embeddings: `(batch_size, num_patches + 1, hidden_size)`."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.patch_embeddings = VMoEPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(
            torch.empty(1, self.patch_embeddings.num_patches + 1, config.hidden_size)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings for an image of `height` x `width` pixels, by bicubic interpolation of the grid."""
        patch_height, patch_width = self.patch_embeddings.patch_size
        grid_height, grid_width = self.patch_embeddings.grid_size
        new_grid = (height // patch_height, width // patch_width)
        if not torch.jit.is_tracing() and new_grid == (grid_height, grid_width):
            return self.position_embeddings
        cls_position, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.reshape(1, grid_height, grid_width, -1).permute(0, 3, 1, 2)
        # in float32, because bicubic resampling in half precision shifts the embeddings
        grid = F.interpolate(grid.float(), size=new_grid, mode="bicubic", align_corners=False).to(cls_position.dtype)
        return torch.cat((cls_position, grid.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        patches = self.patch_embeddings(pixel_values)
        hidden_states = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        if interpolate_pos_encoding:
            return self.dropout(hidden_states + self.interpolate_pos_encoding(height, width))
        if (height, width) != self.patch_embeddings.image_size:
            raise ValueError(
                f"The images are {height}x{width} pixels, but the model's `image_size` is "
                f"{self.patch_embeddings.image_size[0]}x{self.patch_embeddings.image_size[1]}. Resize them, or pass "
                "`interpolate_pos_encoding=True`."
            )
        return self.dropout(hidden_states + self.position_embeddings)


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
    """Multi-head self-attention over all tokens."""

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

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            self.q_proj(hidden_states).view(heads).transpose(1, 2),
            self.k_proj(hidden_states).view(heads).transpose(1, 2),
            self.v_proj(hidden_states).view(heads).transpose(1, 2),
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class VMoEMLP(nn.Module):
    """Dense feed-forward of a layer without experts."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class VMoERouter(nn.Module):
    """
    Linear gate. The `num_experts_per_tok` largest logits select the experts, which are weighted by the softmax over
    these logits (or over all logits). There is no capacity limit, so no token is dropped.
    """

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.noise_std = config.router_noise_std / config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)

        Returns:
            Logits and noisy logits of shape `(num_tokens, num_experts)`, and weights and indices of the selected
            experts of shape `(num_tokens, num_experts_per_tok)`.
        """
        logits = F.linear(hidden_states, self.weight, self.bias)
        noisy_logits = logits
        if self.training and self.noise_std > 0:
            noisy_logits = logits + self.noise_std * torch.randn_like(logits)
        top_k_logits, top_k_index = torch.topk(noisy_logits, self.top_k, dim=-1)
        # CODEPATH: Google's V-MoE checkpoints use the softmax over all experts, m2mKD's over the selected ones
        if self.norm_topk_prob:
            top_k_weights = F.softmax(top_k_logits, dim=-1, dtype=torch.float32)
        else:
            top_k_weights = F.softmax(noisy_logits, dim=-1, dtype=torch.float32).gather(-1, top_k_index)
        return logits, noisy_logits, top_k_weights.to(hidden_states.dtype), top_k_index


@use_experts_implementation(experts_interface=AnyWidthExpertsInterface(), has_gate=False, has_bias=True)
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
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            hidden = F.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            hidden = F.linear(self.act_fn(hidden), self.down_proj[expert], self.down_proj_bias[expert])
            output.index_add_(0, token, (hidden * top_k_weights[token, slot, None]).to(output.dtype))
        return output


class VMoESparseMLP(nn.Module):
    """Router and experts that replace the MLP of a layer."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.router = VMoERouter(config)
        self.experts = VMoEExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, _, top_k_weights, top_k_index = self.router(tokens)
        return self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)


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

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        if self.pre_stitch is not None:
            hidden_states = self.pre_stitch(hidden_states)
        attn_output, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attn_output))
        mlp_output = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.dropout(mlp_output))
        if self.post_stitch is not None:
            hidden_states = self.post_stitch(hidden_states)
        return hidden_states


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
    }
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VMoEEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=std)
            init.trunc_normal_(module.cls_token, mean=0.0, std=std)
        elif isinstance(module, VMoERouter):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
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


@auto_docstring(custom_intro="V-MoE with a linear classifier on the class token.")
class VMoEForImageClassification(VMoEPreTrainedModel):
    def __init__(self, config: VMoEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vmoe = VMoEModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

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
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])

        balance = {}
        if balanced:
            balance = balance_losses(outputs.router_logits, outputs.noisy_router_logits, self.config)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
            if balanced:
                loss = loss + balance["aux_loss"]

        return VMoEImageClassifierOutput(
            loss=loss,
            logits=logits,
            **balance,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if wants_router_logits else None,
        )


@auto_docstring(
    custom_intro="""
    V-MoE as the backbone of a dense-prediction model. Images may have any size, because the position embeddings are
    interpolated. The backbone does not compute the balance losses of the config; only the classifier does.
    """
)
class VMoEBackbone(BackboneMixin, VMoEPreTrainedModel):
    def __init__(self, config: VMoEConfig):
        super().__init__(config)
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
            hidden_states = outputs["hidden_states"][index][:, 1:]
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


def has_balance_loss(config: PreTrainedConfig) -> bool:
    """Whether `config` belongs to a V-MoE and gives a balance loss a weight."""
    if not isinstance(config, VMoEConfig):
        return False
    weights = (config.router_importance_loss_coef, config.router_load_loss_coef)
    return len(config.moe_layers) > 0 and max(weights) > 0


def balance_losses(
    router_logits: tuple[torch.Tensor, ...], noisy_router_logits: tuple[torch.Tensor, ...], config: VMoEConfig
) -> dict[str, torch.Tensor]:
    """
    The balance losses that have a weight in `config`, by name, averaged over the sparse layers (V-MoE paper, appendix
    A).

    Args:
        router_logits (`tuple(torch.Tensor)`): One tensor of shape `(num_tokens, num_experts)` per sparse layer.
        noisy_router_logits (`tuple(torch.Tensor)`): The logits that selected the experts, with the same shapes.

    Returns:
        `aux_loss` (weighted sum), `importance_loss`, and `load_loss` if it has a weight.
    """
    losses = {"importance_loss": torch.stack([importance_loss(logits) for logits in router_logits]).mean()}
    aux_loss = config.router_importance_loss_coef * losses["importance_loss"]
    # CODEPATH: Google's V-MoE checkpoints were trained with the load loss, m2mKD's without
    if config.router_load_loss_coef > 0:
        noise_std = config.router_noise_std / config.num_experts
        layer_losses = [
            load_loss(clean, noisy, noise_std, config.num_experts_per_tok)
            for clean, noisy in zip(router_logits, noisy_router_logits, strict=True)
        ]
        losses["load_loss"] = torch.stack(layer_losses).mean()
        aux_loss = aux_loss + config.router_load_loss_coef * losses["load_loss"]
    return {"aux_loss": aux_loss, **losses}


__all__ = ["VMoEBackbone", "VMoEForImageClassification", "VMoEModel", "VMoEPreTrainedModel"]
