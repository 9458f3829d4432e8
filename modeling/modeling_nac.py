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
"""PyTorch Neural Attentive Circuit (arXiv 2210.08031), in the form that m2mKD distils (arXiv 2402.16918)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from m2mkd.configuration.configuration_nac import NACConfig
from m2mkd.modeling.graph_losses import (
    block_model_graphon,
    block_model_loss,
    link_probability,
    signature_repulsion_loss,
)
from m2mkd.modeling.graph_priors import cosine_distance, signatures_for


logger = logging.get_logger(__name__)


@auto_docstring(custom_intro="Output of [`NACModel`].")
@dataclass
class NACModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_output_latents, hidden_size)`):
        States of the output latents after the read-out.
    hidden_states (`tuple(torch.FloatTensor)`, returned with `output_hidden_states=True`):
        States of input and mediator latents, of shape `(batch_size, num_input_latents + num_mediator_latents,
        hidden_size)`: after the read-in, and after each propagator.
    attentions (`tuple(torch.FloatTensor)`, returned with `output_attentions=True`):
        Attention weights of each propagator and of the read-out, of shape `(batch_size, num_attention_heads,
        num_receivers, num_senders)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`NACForImageClassification`].")
@dataclass
class NACImageClassifierOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, returned when `labels` is given):
        Cross entropy, plus `aux_loss` if there is one.
    logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
        Classification scores before the softmax.
    aux_loss (`torch.FloatTensor` of shape `()`, returned if the config weighs a loss of the graph):
        Weighted sum of `signature_repulsion_loss` and `block_model_loss`.
    signature_repulsion_loss (`torch.FloatTensor` of shape `()`, returned if the config weighs it):
        Unweighted hinge repulsion of the signatures.
    block_model_loss (`torch.FloatTensor` of shape `()`, returned if the config weighs it):
        Unweighted distance of the mediators' graph from the stochastic block model.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    signature_repulsion_loss: torch.FloatTensor | None = None
    block_model_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


# ---- Image tokenizer ----


class NACTokenizerLinear(nn.Linear):
    """A linear layer of the tokenizer, which starts as a ConvNeXt's."""


class NACTokenizerBlock(nn.Module):
    """ConvNeXt block on `(batch_size, height, width, channels)`: depthwise convolution, then a perceptron a pixel."""

    def __init__(self, config: NACConfig, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.layernorm = nn.LayerNorm(channels, eps=1e-6)
        self.fc1 = NACTokenizerLinear(channels, 4 * channels)
        self.fc2 = NACTokenizerLinear(4 * channels, channels)
        self.activation_fn = nn.GELU()
        self.layer_scale = nn.Parameter(torch.empty(channels))
        self.layer_scale_init_value = config.tokenizer_layer_scale_init_value

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = self.fc2(self.activation_fn(self.fc1(self.layernorm(hidden))))
        return features + self.layer_scale * hidden


class NACTokenizerStage(nn.Module):
    """One resolution of the tokenizer: a strided convolution beside a layer norm, then ConvNeXt blocks."""

    def __init__(self, config: NACConfig, stage_idx: int):
        super().__init__()
        self.is_stem = stage_idx == 0
        channels = config.tokenizer_hidden_sizes[stage_idx]
        in_channels = config.num_channels if self.is_stem else config.tokenizer_hidden_sizes[stage_idx - 1]
        stride = 4 if self.is_stem else 2
        # the stem normalises its output, the other stages their input
        self.layernorm = nn.LayerNorm(channels if self.is_stem else in_channels, eps=1e-6)
        self.projection = nn.Conv2d(in_channels, channels, kernel_size=stride, stride=stride)
        self.blocks = nn.ModuleList(
            [NACTokenizerBlock(config, channels) for _ in range(config.tokenizer_depths[stage_idx])]
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.is_stem:
            features = self.layernorm(features)
        features = self.projection(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.is_stem:
            features = self.layernorm(features)
        for block in self.blocks:
            features = block(features)
        return features


class NACImageTokenizer(nn.Module):
    """ConvNeXt stages and a learned positional grid: `(batch_size, num_tokens, token_size)`."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.token_stride = config.token_stride
        image_size = config.image_size
        height, width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.grid_size = (height // self.token_stride, width // self.token_stride)
        self.stages = nn.ModuleList([NACTokenizerStage(config, i) for i in range(len(config.tokenizer_depths))])
        self.position_embeddings = None
        if config.position_embedding_size > 0:
            self.position_embeddings = nn.Parameter(torch.empty(1, config.position_embedding_size, *self.grid_size))

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """The positional grid for `height` x `width` tokens, by bicubic interpolation."""
        grid = self.position_embeddings
        if not torch.jit.is_tracing() and (height, width) == self.grid_size:
            return grid
        # in float32: bicubic resampling in half precision shifts the embeddings
        return F.interpolate(grid.float(), size=(height, width), mode="bicubic", align_corners=False).to(grid.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        channels, height, width = pixel_values.shape[1:]
        if channels != self.num_channels or min(height, width) < self.token_stride:
            raise ValueError(
                f"`pixel_values` have {channels} channels and {height}x{width} pixels, but the model's `num_channels` "
                f"is {self.num_channels} and one token covers {self.token_stride}x{self.token_stride} pixels."
            )
        features = pixel_values.to(self.stages[0].projection.weight.dtype).permute(0, 2, 3, 1)
        for stage in self.stages:
            features = stage(features)
        if self.position_embeddings is not None:
            grid = self.interpolate_pos_encoding(*features.shape[1:3]).permute(0, 2, 3, 1)
            features = torch.cat((features, grid.expand(features.shape[0], -1, -1, -1).to(features.dtype)), dim=-1)
        return features.flatten(1, 2)


# ---- Latents ----


class NACLatents(nn.Module):
    """
    A set of latents: signatures (where each lies in the graph), codes (what each computes) and, without a seeder,
    their first states.
    """

    def __init__(self, config: NACConfig, num_latents: int, is_mediator: bool = False):
        super().__init__()
        self.num_latents = num_latents
        self.is_mediator = is_mediator
        has_layers = is_mediator and not config.share_codes_between_layers
        layers = (config.num_hidden_layers,) if has_layers else ()
        self.signatures = nn.Parameter(
            torch.empty(num_latents, config.signature_size), requires_grad=config.learnable_signatures
        )
        self.codes = nn.Parameter(torch.empty(*layers, num_latents, config.code_size))
        self.initial_states = None
        if not config.use_latent_seeder and not (is_mediator and config.mediators_start_as_inputs):
            self.initial_states = nn.Parameter(torch.empty(num_latents, config.hidden_size))

    def layer_codes(self, layer_idx: int) -> torch.Tensor:
        """Codes of shape `(num_latents, code_size)` in one round of messages; -1 is the last."""
        return self.codes[layer_idx] if self.codes.dim() == 3 else self.codes


def add_code_noise(codes: torch.Tensor, scale: float) -> torch.Tensor:
    """`codes` of shape `(num_latents, code_size)` plus uniform noise of at most `scale` times their size."""
    noise = torch.rand(codes.shape, dtype=codes.dtype, device=codes.device)
    bound = scale * codes.detach().abs()
    return codes + (noise * (2 * bound) - bound)


class NACLogVariance(nn.Linear):
    """Logarithm of the seeder's variance; it starts at a standard deviation of about `exp(-2.5)`."""


class NACLatentSeeder(nn.Module):
    """Computes the first state of each latent from its code; in training with noise of a learned size."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.code_noise_scale = config.code_noise_scale if config.use_code_noise_in_latent_seeder else 0.0
        self.sample_in_eval = config.sample_in_eval
        self.layernorm = nn.LayerNorm(config.code_size, eps=config.layer_norm_eps)
        self.mean = nn.Linear(config.code_size, config.hidden_size)
        self.log_variance = NACLogVariance(config.code_size, config.hidden_size) if config.use_state_noise else None

    def forward(self, codes: torch.Tensor, batch_size: int) -> torch.Tensor:
        """`(num_latents, code_size)` to `(batch_size, num_latents, hidden_size)`."""
        if self.training and self.code_noise_scale > 0:
            codes = add_code_noise(codes, self.code_noise_scale)
        codes = self.layernorm(codes)
        mean = self.mean(codes)
        if self.log_variance is None or not (self.training or self.sample_in_eval):
            return mean.expand(batch_size, -1, -1)
        std = (0.5 * self.log_variance(codes)).exp()
        return mean + std * torch.randn(batch_size, *mean.shape, dtype=mean.dtype, device=mean.device)


class NACModulatedLinear(nn.Module):
    """
    ModFC of the NAC paper: a linear layer whose inputs are scaled, channel by channel, as the latent's code says:
    `y_u = W (x_u ∘ (gain * layernorm(P code_u) + 1)) + b`.
    """

    def __init__(self, config: NACConfig, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.code_projection = nn.Linear(config.code_size, in_features, bias=False)
        self.offset = 1.0 if config.add_one_to_code_scale else 0.0
        self.gain_init_value = config.code_scale_gain
        self.gain = nn.Parameter(torch.empty(())) if config.learnable_code_scale_gain else None

    def code_scale(self, codes: torch.Tensor) -> torch.Tensor:
        """`(num_latents, code_size)` to the scale of each latent's inputs, `(num_latents, in_features)`."""
        scale = F.layer_norm(self.code_projection(codes), (self.in_features,), eps=1e-5)
        gain = self.gain_init_value if self.gain is None else self.gain
        return gain * scale + self.offset

    def forward(
        self, hidden_states: torch.Tensor, codes: torch.Tensor, layer_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        `(batch_size, num_latents, in_features)` to `(batch_size, num_latents, out_features)`, times `layer_scale` of
        shape `(out_features,)`: a factor of the weights, which are smaller than the activations.
        """
        weight, bias = self.weight, self.bias
        if layer_scale is not None:
            weight, bias = layer_scale[:, None] * weight, layer_scale * bias
        return F.linear(hidden_states * self.code_scale(codes), weight, bias)


# ---- The graph ----


class NACKernel(nn.Module):
    """
    Affinity of two latents, `exp(-distance / bandwidth)` of their signatures, 0 beyond the truncation. Attention adds
    its logarithm to the scores; training may draw the edges of each image from a relaxed Bernoulli of it.
    """

    def __init__(self, config: NACConfig, is_read_out: bool = False):
        super().__init__()
        # all latents send to the outputs, always
        self.truncation = None if is_read_out else config.kernel_truncation
        self.truncation_type = config.kernel_truncation_type
        self.is_stochastic = config.stochastic_kernel and not is_read_out
        self.temperature = config.kernel_temperature
        self.bandwidth_init_value = config.kernel_bandwidth
        if config.learnable_bandwidth or is_read_out:
            self.bandwidth = nn.Parameter(torch.empty(()))
        else:
            self.bandwidth = nn.Buffer(torch.empty(()))

    def log_affinity(self, distance: torch.Tensor) -> torch.Tensor:
        """
        Args:
            distance (`torch.Tensor` of shape `(num_receivers, num_senders)`): Cosine distance of the signatures.

        Returns:
            `torch.Tensor` of the same shape, minus infinity where two latents are not connected.
        """
        log_affinity = -distance / self.bandwidth.float()
        if self.truncation is None:
            return log_affinity
        is_masked = self.truncation_type == "masked"
        too_far = distance >= self.truncation if is_masked else distance > self.truncation
        return log_affinity.masked_fill(too_far, -torch.inf)

    def sample(self, log_affinity: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        The logarithm of edges drawn from a relaxed Bernoulli, of shape `(batch_size, num_receivers, num_senders)`. Cut
        edges keep a chance of `eps`, not 0, so that the logarithm stays finite.
        """
        eps = torch.finfo(log_affinity.dtype).eps
        shape = (batch_size, *log_affinity.shape)
        uniform = torch.rand(shape, dtype=log_affinity.dtype, device=log_affinity.device)
        odds = torch.logit(log_affinity.exp().clamp(eps, 1 - eps))
        # the logarithm of the sigmoid; unlike `logsigmoid` it keeps one tensor for the backward pass
        return -F.softplus((torch.logit(uniform, eps=eps) + odds) / -self.temperature)

    def forward(self, log_affinity: torch.Tensor, batch_size: int) -> torch.Tensor:
        """The bias of the attention scores, of shape `(1 or batch_size, 1, num_receivers, num_senders)`."""
        if self.training and self.is_stochastic:
            return self.sample(log_affinity, batch_size)[:, None]
        return log_affinity[None, None]


# ---- Attention and feed-forward ----


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
    """Plain softmax attention; the reference of every other backend."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        # in place: these are the largest tensors of the model
        scores += attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


class NACReadInAttention(nn.Module):
    """
    Input latents attend to image tokens. Keys and values are modulated linear maps of the tokens, another one for each
    latent: `k_uv = W_k (x_v ∘ s_u)`. Since `q_u · k_uv = (s_u ∘ W_k^T q_u) · x_v`, and likewise for the values, the
    maps move to the side of the latents, and the attention has the tokens themselves for keys and values, shared by
    all latents and heads. Exact; a bias of the keys would add the same to all scores of a latent and drops out.
    """

    def __init__(self, config: NACConfig):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.has_residual = config.read_in_residual
        size, token_size, bias = config.hidden_size, config.token_size, config.qkv_bias
        self.sender_layernorm = nn.LayerNorm(token_size, eps=config.layer_norm_eps)
        self.receiver_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.q_proj = NACModulatedLinear(config, size, size, bias)
        self.k_proj = NACModulatedLinear(config, token_size, size, bias=False)
        self.v_proj = NACModulatedLinear(config, token_size, size, bias)
        self.o_proj = NACModulatedLinear(config, size, size)
        self.layer_scale = nn.Parameter(torch.empty(size))
        self.layer_scale_init_value = config.read_in_layer_scale_init_value

    def forward(self, states: torch.Tensor, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(batch_size, num_latents, hidden_size)`)
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, token_size)`)
            codes (`torch.Tensor` of shape `(num_latents, code_size)`): Or `(1, code_size)`, one for all.
        """
        batch_size, num_latents, _ = states.shape
        heads = (self.num_heads, self.head_dim, -1)
        tokens = self.sender_layernorm(tokens)
        queries = self.q_proj(self.receiver_layernorm(states), codes)
        queries = queries.view(batch_size, num_latents, self.num_heads, self.head_dim)
        # (batch, latents, heads, token_size): each head of a latent asks for a vector of token space
        queries = torch.einsum("buhd,hdx->buhx", queries, self.k_proj.weight.view(heads))
        queries = (queries * self.k_proj.code_scale(codes)[:, None]).flatten(1, 2)[:, None].to(tokens.dtype)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        messages, _ = attention_interface(self, queries, tokens[:, None], tokens[:, None], None, scaling=self.scaling)
        messages = messages.reshape(batch_size, num_latents, self.num_heads, -1)
        messages = messages * self.v_proj.code_scale(codes)[:, None]
        values = torch.einsum("buhx,hdx->buhd", messages, self.v_proj.weight.view(heads)).flatten(2)
        if self.v_proj.bias is not None:
            values = values + self.v_proj.bias
        output = self.o_proj(values, codes, self.layer_scale)
        return states + output if self.has_residual else output


class NACLatentAttention(nn.Module):
    """Receivers attend to senders, along the graph if a bias gives one; every latent has its own code."""

    def __init__(self, config: NACConfig, is_read_out: bool = False):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.has_residual = config.read_out_residual if is_read_out else True
        size, bias = config.hidden_size, config.qkv_bias
        self.receiver_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        has_own_layernorm = is_read_out or not config.share_layernorm
        self.sender_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps) if has_own_layernorm else None
        self.q_proj = NACModulatedLinear(config, size, size, bias)
        self.k_proj = NACModulatedLinear(config, size, size, bias)
        self.v_proj = NACModulatedLinear(config, size, size, bias)
        self.o_proj = NACModulatedLinear(config, size, size)
        self.layer_scale = nn.Parameter(torch.empty(size))
        self.layer_scale_init_value = config.layer_scale_init_value
        drop_prob = config.read_out_drop_path_rate if is_read_out else config.drop_path_rate
        self.drop_path = NACDropPath(drop_prob if self.has_residual else 0.0)

    def forward(
        self,
        receivers: torch.Tensor,
        senders: torch.Tensor,
        receiver_codes: torch.Tensor,
        sender_codes: torch.Tensor,
        attention_bias: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            receivers (`torch.Tensor` of shape `(batch_size, num_receivers, hidden_size)`): Without a layer norm of
                their own the senders must end with them.
            senders (`torch.Tensor` of shape `(batch_size, num_senders, hidden_size)`)
            receiver_codes, sender_codes (`torch.Tensor` of shape `(num_latents, code_size)`): Or `(1, code_size)`.
            attention_bias (`torch.Tensor` of shape `(1 or batch_size, 1, num_receivers, num_senders)`, *optional*)

        Returns:
            States of the receivers of shape `(batch_size, num_receivers, hidden_size)`, and the attention weights if
            the attention backend gives them.
        """
        batch_size, num_receivers, _ = receivers.shape
        heads = (batch_size, -1, self.num_heads, self.head_dim)
        if self.sender_layernorm is None:
            sender_inputs = self.receiver_layernorm(senders)
            receiver_inputs = sender_inputs[:, -num_receivers:]
        else:
            sender_inputs, receiver_inputs = self.sender_layernorm(senders), self.receiver_layernorm(receivers)
        queries = self.q_proj(receiver_inputs, receiver_codes).view(heads).transpose(1, 2)
        keys = self.k_proj(sender_inputs, sender_codes).view(heads).transpose(1, 2)
        values = self.v_proj(sender_inputs, sender_codes).view(heads).transpose(1, 2)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if attention_bias is not None:
            attention_bias = attention_bias.to(queries.dtype)
        messages, weights = attention_interface(
            self, queries, keys, values, attention_bias, scaling=self.scaling, **kwargs
        )
        output = self.o_proj(messages.reshape(batch_size, num_receivers, -1), receiver_codes, self.layer_scale)
        return self.drop_path(receivers, output) if self.has_residual else output, weights


class NACFeedForward(nn.Module):
    """Modulated feed-forward of each latent, with a residual: `x + layer_scale * W_2 act(W_1 layernorm(x))`."""

    def __init__(self, config: NACConfig, drop_path_rate: float):
        super().__init__()
        self.is_gated = config.use_geglu
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        hidden_size = config.intermediate_size * (2 if self.is_gated else 1)
        self.fc1 = NACModulatedLinear(config, config.hidden_size, hidden_size)
        self.fc2 = NACModulatedLinear(config, config.intermediate_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.layer_scale = nn.Parameter(torch.empty(config.hidden_size))
        self.layer_scale_init_value = config.layer_scale_init_value
        self.drop_path = NACDropPath(drop_path_rate)

    def forward(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_latents, hidden_size)` to the same; codes as in [`NACLatentAttention`]."""
        hidden = self.fc1(self.layernorm(states), codes)
        if self.is_gated:
            hidden, gate = hidden.chunk(2, dim=-1)
            hidden = hidden * self.activation_fn(gate)
        else:
            hidden = self.activation_fn(hidden)
        return self.drop_path(states, self.fc2(hidden, codes, self.layer_scale))


class NACDropPath(nn.Module):
    """Residual sum with stochastic depth: in training whole images drop the branch."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """`hidden_states + branch`, both of shape `(batch_size, num_latents, hidden_size)`."""
        if self.drop_prob == 0 or not self.training:
            return hidden_states + branch
        keep_prob = 1 - self.drop_prob
        uniform = torch.rand(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device)
        return hidden_states + branch * (torch.floor(uniform + keep_prob) / keep_prob)


# ---- The parts of a circuit ----


class NACReadIn(nn.Module):
    """Input latents read the image: attention, then feed-forward."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.code_noise_scale = config.code_noise_scale
        self.attention = NACReadInAttention(config)
        self.ffn = NACFeedForward(config, config.read_in_drop_path_rate)

    def forward(self, states: torch.Tensor, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """As [`NACReadInAttention`], which it begins with."""
        if self.training and self.code_noise_scale > 0:
            codes = add_code_noise(codes, self.code_noise_scale)
        return self.ffn(self.attention(states, tokens, codes), codes)


class NACPropagator(GradientCheckpointingLayer):
    """One round of messages from input and mediator latents to the mediators: attention, then feed-forward."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.num_input_latents = config.num_input_latents
        self.code_noise_scale = config.code_noise_scale
        self.kernel = NACKernel(config)
        self.attention = NACLatentAttention(config)
        self.ffn = NACFeedForward(config, config.drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        receiver_codes: torch.Tensor,
        sender_codes: torch.Tensor,
        log_affinity: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Of shape
                `(batch_size, num_input_latents + num_mediator_latents, hidden_size)`.
            receiver_codes (`torch.Tensor` of shape `(num_mediator_latents, code_size)`)
            sender_codes (`torch.Tensor` of shape `(num_senders, code_size)`): Of inputs and mediators; of the
                mediators alone, if the inputs do not send.
            log_affinity (`torch.Tensor` of shape `(num_mediator_latents, num_senders)`): See [`NACKernel`].

        Returns:
            `torch.Tensor` of the shape of `hidden_states`, the input latents unchanged.
        """
        if self.training and self.code_noise_scale > 0:
            receiver_codes = add_code_noise(receiver_codes, self.code_noise_scale)
            sender_codes = add_code_noise(sender_codes, self.code_noise_scale)
        inputs, mediators = hidden_states[:, : self.num_input_latents], hidden_states[:, self.num_input_latents :]
        senders = hidden_states if log_affinity.shape[1] == hidden_states.shape[1] else mediators
        bias = self.kernel(log_affinity, hidden_states.shape[0])
        mediators, _ = self.attention(mediators, senders, receiver_codes, sender_codes, bias, **kwargs)
        return torch.cat((inputs, self.ffn(mediators, receiver_codes)), dim=1)


class NACReadOut(nn.Module):
    """Output latents read the circuit: attention to all senders, then feed-forward."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.code_noise_scale = config.code_noise_scale
        self.kernel = NACKernel(config, is_read_out=True)
        self.attention = NACLatentAttention(config, is_read_out=True)
        self.ffn = NACFeedForward(config, config.read_out_drop_path_rate)

    def forward(
        self,
        states: torch.Tensor,
        senders: torch.Tensor,
        receiver_codes: torch.Tensor,
        sender_codes: torch.Tensor,
        log_affinity: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        States `(batch_size, num_output_latents, hidden_size)`, senders `(batch_size, num_senders, hidden_size)`, their
        codes and the log affinity of shape `(num_output_latents, num_senders)` to states.
        """
        if self.training and self.code_noise_scale > 0:
            receiver_codes = add_code_noise(receiver_codes, self.code_noise_scale)
            sender_codes = add_code_noise(sender_codes, self.code_noise_scale)
        bias = self.kernel(log_affinity, states.shape[0])
        states, _ = self.attention(states, senders, receiver_codes, sender_codes, bias, **kwargs)
        return self.ffn(states, receiver_codes)


class NACPooling(nn.Module):
    """Confidence pooling: the output latents' states, weighed by a softmax of their confidences."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.is_gumbel, self.is_hard = config.pooling.startswith("gumbel"), config.pooling == "gumbel_hard"
        self.temperature = config.pooling_temperature
        self.sample_in_eval = config.sample_in_eval
        self.confidence = nn.Linear(config.hidden_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_output_latents, hidden_size)` to `(batch_size, hidden_size)`."""
        confidences = self.confidence(states).squeeze(-1)
        if self.is_gumbel and (self.training or self.sample_in_eval):
            weights = F.gumbel_softmax(confidences, tau=self.temperature, hard=self.is_hard, dim=-1)
        else:
            weights = F.softmax(confidences / self.temperature, dim=-1)
            if self.is_hard:
                weights = F.one_hot(weights.argmax(dim=-1), weights.shape[-1]).to(weights.dtype)
        return torch.einsum("buc,bu->bc", states, weights.to(states.dtype))


class NACModulatedHead(nn.Module):
    """Logits from the first output latent, as its code says (`pooling="first"`)."""

    def __init__(self, config: NACConfig):
        super().__init__()
        layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm = layernorm if config.head_layernorm else nn.Identity()
        self.projection = NACModulatedLinear(config, config.hidden_size, config.num_labels)

    def forward(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_output_latents, hidden_size)` to `(batch_size, num_labels)`."""
        return self.projection(self.layernorm(states[:, :1]), codes[:1])[:, 0]


# ---- Models ----


@auto_docstring
class NACPreTrainedModel(PreTrainedModel):
    config: NACConfig
    base_model_prefix = "nac"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["NACImageTokenizer", "NACReadIn", "NACPropagator", "NACReadOut"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NACPropagator, "attentions": NACLatentAttention}
    _input_embed_layer = "tokenizer"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | NACTokenizerLinear):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            # the start of `torch.nn.Linear`, which the official code keeps for these layers
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
            if isinstance(module, NACLogVariance):
                init.constant_(module.bias, -5.0)
        elif isinstance(module, NACTokenizerBlock):
            init.constant_(module.layer_scale, module.layer_scale_init_value)
        elif isinstance(module, NACImageTokenizer):
            if module.position_embeddings is not None:
                init.normal_(module.position_embeddings)
        elif isinstance(module, NACModulatedLinear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.gain is not None:
                init.constant_(module.gain, module.gain_init_value)
        elif isinstance(module, NACKernel):
            init.constant_(module.bandwidth, module.bandwidth_init_value)
        elif isinstance(module, NACReadInAttention | NACLatentAttention | NACFeedForward):
            init.constant_(module.layer_scale, module.layer_scale_init_value)
        elif isinstance(module, NACLatents):
            init.normal_(module.codes)
            if module.initial_states is not None:
                init.normal_(module.initial_states)
            self._init_signatures(module)

    def _init_signatures(self, latents: NACLatents) -> None:
        """Random signatures, or those of the graph prior. Never for a loaded tensor: the fit takes seconds."""
        config, signatures = self.config, latents.signatures
        if getattr(signatures, "_is_hf_initialized", False) or signatures.is_meta:
            return
        if config.graph_prior is None or not latents.is_mediator:
            init.normal_(signatures)
            return
        fitted, error = signatures_for(
            config.graph_prior,
            latents.num_latents,
            config.graph_prior_kwargs,
            config.signature_size,
            config.fit_truncation,
            config.graph_prior_seed,
        )
        init.copy_(signatures, fitted.to(signatures))
        logger.info(
            f"Signatures fitted to the graph prior {config.graph_prior!r}; {100 * error:.3g} % of adjacency wrong"
        )


@auto_docstring(custom_intro="The bare circuit: states of its output latents, without pooling and head.")
class NACModel(NACPreTrainedModel):
    def __init__(self, config: NACConfig):
        super().__init__(config)
        self.tokenizer = NACImageTokenizer(config)
        self.input_latents = NACLatents(config, config.num_input_latents)
        self.mediator_latents = NACLatents(config, config.num_mediator_latents, is_mediator=True)
        self.output_latents = NACLatents(config, config.num_output_latents)
        self.latent_seeder = NACLatentSeeder(config) if config.use_latent_seeder else None
        self.read_in = NACReadIn(config)
        num_propagators = 1 if config.share_propagators else config.num_hidden_layers
        self.layers = nn.ModuleList([NACPropagator(config) for _ in range(num_propagators)])
        self.read_out = NACReadOut(config)
        self._eval_affinities: tuple[tuple, list[torch.Tensor]] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokenizer

    def propagator(self, layer_idx: int) -> NACPropagator:
        """The module of one round of messages."""
        return self.layers[0 if self.config.share_propagators else layer_idx]

    def inputs_send(self, layer_idx: int) -> bool:
        """Whether input latents send to the mediators in this round."""
        return {"all": True, "first": layer_idx == 0, "none": False}[self.config.input_to_mediator]

    def seed(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """First states of input, mediator (`None` if they start as inputs) and output latents, for a batch."""

        def first_states(latents: NACLatents, codes: torch.Tensor) -> torch.Tensor:
            if self.latent_seeder is not None:
                return self.latent_seeder(codes, batch_size)
            return latents.initial_states.expand(batch_size, -1, -1)

        inputs = first_states(self.input_latents, self.input_latents.codes)
        mediators = None
        if not self.config.mediators_start_as_inputs:
            mediators = first_states(self.mediator_latents, self.mediator_latents.layer_codes(0))
        return inputs, mediators, first_states(self.output_latents, self.output_latents.codes)

    def read(self, pixel_values: torch.Tensor, inputs: torch.Tensor, mediators: torch.Tensor | None) -> torch.Tensor:
        """Read the images: the hidden states that the propagators work on (see `NACModelOutput.hidden_states`)."""
        inputs = self.read_in(inputs, self.tokenizer(pixel_values), self.input_latents.codes)
        return torch.cat((inputs, inputs if mediators is None else mediators), dim=1)

    def propagate(
        self,
        hidden_states: torch.Tensor,
        layer_idx: int,
        log_affinity: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """One round of messages; `log_affinity` as in [`NACPropagator`]."""
        codes = self.mediator_latents.layer_codes(layer_idx)
        sender_codes = torch.cat((self.input_latents.codes, codes)) if self.inputs_send(layer_idx) else codes
        return self.propagator(layer_idx)(hidden_states, codes, sender_codes, log_affinity, **kwargs)

    def write(
        self,
        hidden_states: torch.Tensor,
        outputs: torch.Tensor,
        log_affinity: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Read-out: first states of the output latents to their last ones."""
        sender_codes = self.mediator_latents.layer_codes(-1)
        if self.config.input_to_output:
            sender_codes = torch.cat((self.input_latents.codes, sender_codes))
        else:
            hidden_states = hidden_states[:, self.config.num_input_latents :]
        return self.read_out(outputs, hidden_states, self.output_latents.codes, sender_codes, log_affinity, **kwargs)

    def log_affinities(self) -> list[torch.Tensor]:
        """
        Log affinity of each round's senders and mediators, and last that of the read-out: once for each distinct
        bandwidth, and in evaluation once for all forwards until signatures or bandwidths change.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self._compute_log_affinities(by_value=False)
        sources = [latents.signatures for latents in (self.input_latents, self.mediator_latents, self.output_latents)]
        sources += [kernel.bandwidth for kernel in (*(layer.kernel for layer in self.layers), self.read_out.kernel)]
        if any(source.is_inference() for source in sources):
            return self._compute_log_affinities(by_value=False)
        state = tuple((source.data_ptr(), source._version, source.dtype, source.device) for source in sources)
        if self._eval_affinities is None or self._eval_affinities[0] != state:
            self._eval_affinities = (state, self._compute_log_affinities(by_value=True))
        return self._eval_affinities[1]

    def _compute_log_affinities(self, by_value: bool) -> list[torch.Tensor]:
        config = self.config
        inputs, mediators = self.input_latents.signatures, self.mediator_latents.signatures
        # in float32, whatever autocast says: the truncation is a decision
        with torch.autocast(device_type=mediators.device.type, enabled=False):
            inputs, mediators = inputs.float(), mediators.float()
            senders = torch.cat((inputs, mediators))
            distance = cosine_distance(mediators, senders)
            known: dict[tuple, torch.Tensor] = {}
            affinities = []
            for layer_idx in range(config.num_hidden_layers):
                kernel, inputs_send = self.propagator(layer_idx).kernel, self.inputs_send(layer_idx)
                key = (float(kernel.bandwidth) if by_value else id(kernel), inputs_send)
                if key not in known:
                    known[key] = kernel.log_affinity(distance if inputs_send else distance[:, len(inputs) :])
                affinities.append(known[key])
            outputs = self.output_latents.signatures.float()
            distance = cosine_distance(outputs, senders if config.input_to_output else mediators)
            return [*affinities, self.read_out.kernel.log_affinity(distance)]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> NACModelOutput:
        inputs, mediators, outputs = self.seed(pixel_values.shape[0])
        affinities = self.log_affinities()
        hidden_states = self.read(pixel_values, inputs, mediators)
        for layer_idx in range(self.config.num_hidden_layers):
            hidden_states = self.propagate(hidden_states, layer_idx, affinities[layer_idx], **kwargs)
        return NACModelOutput(last_hidden_state=self.write(hidden_states, outputs, affinities[-1], **kwargs))


@auto_docstring(custom_intro="Neural Attentive Circuit with a classifier on its pooled output latents.")
class NACForImageClassification(NACPreTrainedModel):
    def __init__(self, config: NACConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.nac = NACModel(config)
        is_pooled = config.pooling != "first"
        self.pooling = NACPooling(config) if is_pooled else None
        if config.num_labels == 0:
            self.classifier = nn.Identity()
        elif is_pooled:
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        else:
            self.classifier = NACModulatedHead(config)
        self.post_init()

    def classify(self, states: torch.Tensor) -> torch.Tensor:
        """States of the output latents, `(batch_size, num_output_latents, hidden_size)`, to logits."""
        if self.pooling is not None:
            return self.classifier(self.pooling(states))
        if self.num_labels == 0:
            return states[:, 0]
        return self.classifier(states, self.nac.output_latents.codes)

    def graph_losses(self) -> dict[str, torch.Tensor]:
        """
        The losses of the graph that the config weighs, by name, and their weighted sum `aux_loss`; none: `{}`. They
        are functions of signatures and bandwidths, not of the images.
        """
        config, losses, aux_loss = self.config, {}, 0.0
        mediators = self.nac.mediator_latents.signatures.float()
        # CODEPATH: m2mKD regularises its planted-partition NAC by the block model, the others by the repulsion
        if config.signature_repulsion_coef > 0:
            others = (self.nac.input_latents.signatures.float(), self.nac.output_latents.signatures.float())
            signatures = torch.cat((others[0], mediators, others[1]))
            loss = signature_repulsion_loss(signatures, config.signature_repulsion_hinge)
            losses["signature_repulsion_loss"] = loss
            aux_loss = aux_loss + config.signature_repulsion_coef * loss
        # CODEPATH: see above
        if config.block_model_coef > 0:
            graphon = block_model_graphon(
                config.num_mediator_latents,
                config.block_model_num_clusters,
                config.block_model_p_in,
                config.block_model_p_out,
            ).to(mediators.device)
            # one kernel a round, as the official code does as long as bandwidths are learned
            num_kernels = config.num_hidden_layers if config.learnable_bandwidth else 1
            kernels = [self.nac.propagator(layer_idx).kernel for layer_idx in range(num_kernels)]
            probabilities = [
                link_probability(mediators, mediators, kernel.bandwidth, kernel.truncation, kernel.truncation_type)
                for kernel in kernels
            ]
            losses["block_model_loss"] = torch.stack([block_model_loss(p, graphon) for p in probabilities]).sum()
            aux_loss = aux_loss + config.block_model_coef * losses["block_model_loss"]
        return {"aux_loss": aux_loss, **losses} if losses else {}

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NACImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Class indices from 0 to `num_labels - 1`.

        Example:

        ```python
        >>> import torch
        >>> from m2mkd import NACConfig, NACForImageClassification

        >>> model = NACForImageClassification(NACConfig.from_preset("tiny", num_labels=10)).eval()
        >>> outputs = model(torch.zeros(2, 3, 32, 32))
        >>> list(outputs.logits.shape)
        [2, 10]

        ```"""
        outputs: NACModelOutput = self.nac(pixel_values, **kwargs)
        logits = self.classify(outputs.last_hidden_state)
        loss, graph_losses = None, {}
        if labels is not None:
            graph_losses = self.graph_losses()
            loss = self.loss_function(labels, logits, self.config, **kwargs) + graph_losses.get("aux_loss", 0.0)
        return NACImageClassifierOutput(
            loss=loss,
            logits=logits,
            **graph_losses,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["NACForImageClassification", "NACModel", "NACPreTrainedModel"]
