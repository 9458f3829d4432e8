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
"""Layers of a Neural Attentive Circuit: modulated linear, graph kernel, attention, feed-forward, pooling and head."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from m2mkd.configuration.configuration_nac import NACConfig


# Scores up to this size stay in the cache of a processor core.
PART_BYTES = 2**21

# Lower bound of a learned bandwidth of the graph kernel, in units of the cosine distance. If the optimizer made a
# bandwidth negative, the most distant latents would become the closest.
MIN_BANDWIDTH = 0.01


# What the projection of a code of shape `(num_latents, in_features)` passes before the gain.
CODE_SCALE_NORMALIZATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer_norm": lambda projected: F.layer_norm(projected, projected.shape[-1:], eps=1e-5),
    "l2": lambda projected: F.normalize(projected, dim=-1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda projected: projected,
}


def modulate(hidden_states: torch.Tensor, scale: torch.Tensor, activation_fn: Callable | None) -> torch.Tensor:
    """
    `hidden_states * scale`. With an activation, the hidden states are `[a, gate]`, and the result is the gated unit
    `a * activation_fn(gate) * scale`.
    """
    if activation_fn is None:
        return hidden_states * scale
    hidden_states, gate = hidden_states.chunk(2, dim=-1)
    return hidden_states * activation_fn(gate) * scale


def new_root(tensor: torch.Tensor, keep_graph: bool) -> torch.Tensor:
    """The same values as a new root of the autograd graph. With `keep_graph` they stay a function of `tensor`."""
    return tensor.view_as(tensor) if keep_graph and tensor.requires_grad else tensor.detach().requires_grad_()


class ModulatedLinear(torch.autograd.Function):
    """
    `linear(modulate(x, scale), weight, bias)` that keeps `x` for the backward pass and recomputes the modulated
    inputs. Queries, keys and values share `x`, or `x` is needed anyway, so this saves a third of the memory of
    training a NAC at the cost of a few elementwise products.
    """

    @staticmethod
    def forward(
        hidden_states: torch.Tensor,
        scale: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation_fn: Callable | None,
    ) -> torch.Tensor:
        """See [`modulate`] for the arguments."""
        return F.linear(modulate(hidden_states, scale, activation_fn), weight, bias)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        """Save the inputs for the backward pass."""
        *tensors, _, ctx.activation_fn = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the inputs, which can be differentiated again."""
        *modulation, weight = ctx.saved_tensors
        needs_states, needs_scale, needs_weight, needs_bias, _ = ctx.needs_input_grad
        is_differentiable = torch.is_grad_enabled()
        grad_states = grad_scale = grad_weight = grad_bias = None
        with torch.enable_grad():
            modulation = [new_root(tensor, is_differentiable) for tensor in modulation]
            modulated = modulate(*modulation, ctx.activation_fn)
        if needs_weight:
            inputs = modulated if is_differentiable else modulated.detach()
            # under autocast, the forward product was computed in the dtype of `grad`
            grad_weight = (grad.flatten(0, -2).T @ inputs.to(grad.dtype).flatten(0, -2)).to(weight.dtype)
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(0).to(weight.dtype)
        if needs_states or needs_scale:
            grad_modulated = (grad @ weight.to(grad.dtype)).to(modulated.dtype)
            grad_states, grad_scale = torch.autograd.grad(
                modulated, modulation, grad_modulated, create_graph=is_differentiable
            )
        return grad_states, grad_scale, grad_weight, grad_bias, None


def add_code_noise(codes: torch.Tensor, scale: float) -> torch.Tensor:
    """`codes` of shape `(num_latents, code_size)` plus uniform noise of at most `scale` times their size."""
    noise = torch.rand(codes.shape, dtype=codes.dtype, device=codes.device)
    bound = scale * codes.detach().abs()
    return codes + (noise * (2 * bound) - bound)


class NACModulatedWeight(nn.Module):
    """Parameters of [`NACModulatedLinear`], and the scale of its inputs for a code."""

    def __init__(self, config: NACConfig, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.code_projection = nn.Linear(config.code_size, in_features, bias=False)
        self.normalization = config.code_scale_normalization
        self.offset = 1.0 if config.add_one_to_code_scale else 0.0
        self.gain_init_value = config.code_scale_gain
        self.gain = nn.Parameter(torch.empty(())) if config.learnable_code_scale_gain else None

    def code_scale(self, codes: torch.Tensor) -> torch.Tensor:
        """Scale of the inputs of each latent, `(num_latents, in_features)`, from `(num_latents, code_size)`."""
        # CODEPATH: m2mKD's configurations leave the official `scale_normalization_type` at its default, the layer norm
        scale = CODE_SCALE_NORMALIZATIONS[self.normalization](self.code_projection(codes))
        gain = self.gain_init_value if self.gain is None else self.gain
        return gain * scale + self.offset


class NACModulatedLinear(NACModulatedWeight):
    """
    ModFC of the NAC paper: a linear layer whose inputs are scaled channel by channel, depending on the code of the
    latent: `y_u = W (x_u ∘ (gain * layernorm(P code_u) + 1)) + b`. `code_scale_normalization` may replace the layer
    norm.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        codes: torch.Tensor,
        layer_scale: torch.Tensor | None = None,
        activation_fn: Callable | None = None,
    ) -> torch.Tensor:
        """
        Map `(batch_size, num_latents, in_features)`, or twice the features for a gated unit with `activation_fn`, to
        `(batch_size, num_latents, out_features)`. The result is multiplied by `layer_scale` of shape
        `(out_features,)`, which is applied to the weights because they are smaller than the activations.
        """
        weight, bias = self.weight, self.bias
        if layer_scale is not None:
            weight, bias = layer_scale[:, None] * weight, layer_scale * bias
        scale = self.code_scale(codes)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            # the compiler itself decides what to recompute
            return F.linear(modulate(hidden_states, scale, activation_fn), weight, bias)
        return ModulatedLinear.apply(hidden_states, scale, weight, bias, activation_fn)


class LowerBound(torch.autograd.Function):
    """`tensor.clamp(min=bound)` that also passes a gradient that moves a value back above the bound."""

    @staticmethod
    def forward(tensor: torch.Tensor, bound: float) -> torch.Tensor:
        """Clamp the tensor."""
        return tensor.clamp(min=bound)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        """Save the inputs for the backward pass."""
        tensor, ctx.bound = inputs
        ctx.save_for_backward(tensor)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Pass the gradient at or above the bound, and negative gradients, because descent then raises the value."""
        (tensor,) = ctx.saved_tensors
        return torch.where((tensor >= ctx.bound) | (grad < 0), grad, 0.0), None


class NACKernel(nn.Module):
    """
    Affinity of two latents: `exp(-distance / bandwidth)` of their signatures, and 0 beyond the truncation. Attention
    adds its logarithm to the scores. Training may draw the edges for each image from a relaxed Bernoulli distribution
    with this probability.
    """

    def __init__(self, config: NACConfig, is_read_out: bool = False):
        super().__init__()
        # all latents always send to the outputs
        self.truncation = None if is_read_out else config.kernel_truncation
        self.truncation_type = config.kernel_truncation_type
        self.is_stochastic = config.stochastic_kernel and not is_read_out
        self.temperature = config.kernel_temperature
        self.bandwidth_init_value = config.kernel_bandwidth
        if config.learnable_bandwidth or is_read_out:
            self.bandwidth = nn.Parameter(torch.empty(()))
        else:
            self.bandwidth = nn.Buffer(torch.empty(()))

    def forward(self, distance: torch.Tensor) -> torch.Tensor:
        """
        Log affinity of receivers and senders.

        Args:
            distance (`torch.Tensor` of shape `(num_receivers, num_senders)`): Cosine distance of the signatures.

        Returns:
            `torch.Tensor` of the same shape, minus infinity where two latents are not connected.
        """
        log_affinity = -distance / self.positive_bandwidth()
        if self.truncation is None:
            return log_affinity
        is_masked = self.truncation_type == "masked"
        too_far = distance >= self.truncation if is_masked else distance > self.truncation
        return log_affinity.masked_fill(too_far, -torch.inf)

    def positive_bandwidth(self) -> torch.Tensor:
        """The bandwidth in float32; a learned bandwidth is at least `MIN_BANDWIDTH`."""
        bandwidth = self.bandwidth.float()
        return LowerBound.apply(bandwidth, MIN_BANDWIDTH) if isinstance(self.bandwidth, nn.Parameter) else bandwidth

    def sample(self, log_affinity: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        Logarithm of edges drawn from a relaxed Bernoulli distribution, of shape `(batch_size, num_receivers,
        num_senders)`. Cut edges have a probability of `eps` instead of 0, so that the logarithm stays finite.
        """
        eps = torch.finfo(log_affinity.dtype).eps
        shape = (batch_size, *log_affinity.shape)
        uniform = torch.rand(shape, dtype=log_affinity.dtype, device=log_affinity.device)
        odds = torch.logit(log_affinity.exp().clamp(eps, 1 - eps))
        # the logarithm of the sigmoid; unlike `logsigmoid`, it keeps only one tensor for the backward pass
        return -F.softplus((torch.logit(uniform, eps=eps) + odds) / -self.temperature)

    def bias(self, log_affinity: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        Bias of the attention scores, of shape `(1 or batch_size, 1, num_receivers, num_senders)`. Outside training,
        each image may have its own `log_affinity`.
        """
        if self.training and self.is_stochastic:
            return self.sample(log_affinity, batch_size)[:, None]
        return log_affinity.view(-1, 1, *log_affinity.shape[-2:])


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
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        # in place, because these are the largest tensors of the model
        scores += attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attention_in_parts(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """
    [`eager_attention_forward`] on a few images at a time, recomputed in the backward pass. It is used for a bias that
    requires a gradient, because no fused kernel of torch computes it. The scores of a batch are by far the largest
    tensors of a NAC. The scores of a few images stay in the processor's cache, and none are kept.
    """
    images_a_part = 1 + PART_BYTES // (query.shape[1] * attention_mask[0].nbytes)
    if images_a_part >= len(query):
        return eager_attention_forward(module, query, key, value, attention_mask, scaling)[0], None

    def attend(*part: torch.Tensor) -> torch.Tensor:
        return eager_attention_forward(module, *part, scaling=scaling)[0]

    tensors = (query, key, value, attention_mask.expand(len(query), -1, -1, -1))
    parts = zip(*(tensor.split(images_a_part) for tensor in tensors), strict=True)
    messages = [checkpoint(attend, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(messages), None


class NACReadInKeys(NACModulatedWeight):
    """Map from tokens to keys, applied on the side of the latents (see [`NACReadInAttention`])."""

    def forward(self, queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Queries in token space, from `(batch_size, num_latents, num_heads, head_dim)` and the latents' codes."""
        weight = self.weight.view(*queries.shape[2:], -1)
        return torch.einsum("buhd,hdx->buhx", queries, weight) * self.code_scale(codes)[:, None]


class NACReadInValues(NACModulatedWeight):
    """Map from tokens to values, applied to the message that each head of a latent has received."""

    def forward(self, messages: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, num_latents, num_heads, token_size)` to `(batch_size, num_latents, hidden_size)`."""
        weight = self.weight.view(messages.shape[2], -1, messages.shape[3])
        values = torch.einsum("buhx,hdx->buhd", messages * self.code_scale(codes)[:, None], weight).flatten(2)
        return values if self.bias is None else values + self.bias


class NACReadInAttention(nn.Module):
    """
    Input latents attend to image tokens. Keys and values are modulated linear maps of the tokens, with a different map
    for each latent: `k_uv = W_k (x_v ∘ s_u)`. Since `q_u · k_uv = (s_u ∘ W_k^T q_u) · x_v`, and likewise for the
    values, the maps can be applied on the side of the latents. The tokens themselves are then the keys and values,
    shared by all latents and heads. This is exact. A bias of the keys is left out, because it would add the same
    number to all scores of a latent.
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
        self.k_proj = NACReadInKeys(config, token_size, size, bias=False)
        self.v_proj = NACReadInValues(config, token_size, size, bias)
        self.o_proj = NACModulatedLinear(config, size, size)
        self.layer_scale = nn.Parameter(torch.empty(size))
        self.layer_scale_init_value = config.read_in_layer_scale_init_value

    def forward(self, states: torch.Tensor, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(batch_size, num_latents, hidden_size)`)
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, token_size)`)
            codes (`torch.Tensor` of shape `(num_latents, code_size)`): Or `(1, code_size)`, one code for all latents.
        """
        batch_size, num_latents, _ = states.shape
        tokens = self.sender_layernorm(tokens)
        queries = self.q_proj(self.receiver_layernorm(states), codes)
        queries = self.k_proj(queries.view(batch_size, num_latents, self.num_heads, self.head_dim), codes)
        # The heads of all latents form one sequence of queries, and the tokens form a single head of keys and values.
        queries = queries.flatten(1, 2)[:, None].to(tokens.dtype)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        messages, _ = attention_interface(self, queries, tokens[:, None], tokens[:, None], None, scaling=self.scaling)
        values = self.v_proj(messages.reshape(batch_size, num_latents, self.num_heads, -1), codes)
        output = self.o_proj(values, codes, self.layer_scale)
        return states + output if self.has_residual else output


class NACLatentAttention(nn.Module):
    """Receivers attend to senders, along the graph if a bias defines one. Every latent has its own code."""

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
        self.drop_path = NACDropPath(config, drop_prob)

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
            receivers (`torch.Tensor` of shape `(batch_size, num_receivers, hidden_size)`): If the senders have no
                layer norm of their own, the receivers must be the last of the senders.
            senders (`torch.Tensor` of shape `(batch_size, num_senders, hidden_size)`)
            receiver_codes, sender_codes (`torch.Tensor` of shape `(num_latents, code_size)`): Or `(1, code_size)`.
            attention_bias (`torch.Tensor` of shape `(1 or batch_size, 1, num_receivers, num_senders)`, *optional*)

        Returns:
            States of the receivers of shape `(batch_size, num_receivers, hidden_size)`, and the attention weights if
            the attention backend returns them.
        """

        def branch(
            receivers: torch.Tensor, senders: torch.Tensor, attention_bias: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self.attend(receivers, senders, receiver_codes, sender_codes, attention_bias, **kwargs)

        if self.has_residual:
            return self.drop_path(branch, receivers, senders, attention_bias)
        return branch(receivers, senders, attention_bias)

    def attend(
        self,
        receivers: torch.Tensor,
        senders: torch.Tensor,
        receiver_codes: torch.Tensor,
        sender_codes: torch.Tensor,
        attention_bias: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the update that `forward` adds to the receivers, and the attention weights."""
        heads = (receivers.shape[0], -1, self.num_heads, self.head_dim)
        if self.sender_layernorm is None:
            sender_inputs = self.receiver_layernorm(senders)
            receiver_inputs = sender_inputs[:, -receivers.shape[1] :]
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
        if (
            self.config._attn_implementation == "sdpa"
            and attention_bias is not None
            and attention_bias.requires_grad
            and queries.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            attention_interface = attention_in_parts
        messages, weights = attention_interface(
            self, queries, keys, values, attention_bias, scaling=self.scaling, **kwargs
        )
        return self.o_proj(messages.flatten(2), receiver_codes, self.layer_scale), weights


class NACDropPath(nn.Module):
    """
    Residual sum with stochastic depth: in training, whole images drop the branch. On a CPU the branch is computed only
    for the images that keep it, except with eager attention, which is the reference.
    """

    def __init__(self, config: NACConfig, drop_prob: float):
        super().__init__()
        self.config = config
        self.drop_prob = drop_prob

    def forward(
        self,
        branch: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        hidden_states: torch.Tensor,
        *others: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            branch (`Callable`): Takes `hidden_states` and the others, for all or some of the images, and returns the
                update of the states, and attention weights if it has any.
            hidden_states (`torch.Tensor` of shape `(batch_size, num_latents, hidden_size)`)
            others (`torch.Tensor` of shape `(1 or batch_size, ...)`, *optional*)

        Returns:
            The sum, and the attention weights, if the branch has any and was computed for all images.
        """
        if self.drop_prob == 0 or not self.training:
            gain, weights = branch(hidden_states, *others)
            return hidden_states + gain, weights
        batch_size, keep_prob = hidden_states.shape[0], 1 - self.drop_prob
        uniform = torch.rand(batch_size, 1, 1, dtype=hidden_states.dtype, device=hidden_states.device)
        is_kept = torch.floor(uniform + keep_prob)
        # A GPU would have to wait for the number of images, and a compiler would compile once for each number.
        may_skip = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        if may_skip and self.config._attn_implementation != "eager":
            kept = is_kept.flatten().nonzero().flatten()
            if 0 < len(kept) < batch_size:
                some = [other if other is None or len(other) == 1 else other.index_select(0, kept) for other in others]
                gain, _ = branch(hidden_states.index_select(0, kept), *some)
                return hidden_states.index_add(0, kept, gain.to(hidden_states.dtype), alpha=1 / keep_prob), None
        gain, weights = branch(hidden_states, *others)
        return torch.addcmul(hidden_states, gain, is_kept / keep_prob), weights


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
        self.drop_path = NACDropPath(config, drop_path_rate)

    def forward(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, num_latents, hidden_size)` to the same shape; codes as in [`NACLatentAttention`]."""

        def branch(states: torch.Tensor) -> tuple[torch.Tensor, None]:
            hidden = self.fc1(self.layernorm(states), codes)
            if self.is_gated:
                return self.fc2(hidden, codes, self.layer_scale, self.activation_fn), None
            return self.fc2(self.activation_fn(hidden), codes, self.layer_scale), None

        return self.drop_path(branch, states)[0]


# ---- From output latents to logits ----


class NACPooling(nn.Module):
    """Confidence pooling: the states of the output latents, weighted by a softmax of their confidences."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.is_gumbel, self.is_hard = config.pooling.startswith("gumbel"), config.pooling == "gumbel_hard"
        self.temperature = config.pooling_temperature
        self.sample_in_eval = config.sample_in_eval
        self.confidence = nn.Linear(config.pooled_size, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, num_output_latents, pooled_size)` to `(batch_size, pooled_size)`."""
        confidences = self.confidence(states).squeeze(-1)
        if self.is_gumbel and (self.training or self.sample_in_eval):
            weights = F.gumbel_softmax(confidences, tau=self.temperature, hard=self.is_hard, dim=-1)
        else:
            weights = F.softmax(confidences / self.temperature, dim=-1)
            if self.is_hard:
                weights = F.one_hot(weights.argmax(dim=-1), weights.shape[-1]).to(weights.dtype)
        return torch.einsum("buc,bu->bc", states, weights.to(states.dtype))


class NACModulatedHead(nn.Module):
    """
    Head that is applied to each output latent, depending on its code: it computes the logits from the first one
    (`pooling="first"`), or what is pooled (`latent_head_size`).
    """

    def __init__(self, config: NACConfig, out_features: int):
        super().__init__()
        layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # CODEPATH: official `pre_output_layernorm: true` normalizes; m2mKD's checkpoints have no such head
        self.layernorm = layernorm if config.head_layernorm else nn.Identity()
        self.projection = NACModulatedLinear(config, config.hidden_size, out_features)

    def forward(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, num_latents, hidden_size)` and codes to `(batch_size, num_latents, out_features)`."""
        return self.projection(self.layernorm(states), codes)
