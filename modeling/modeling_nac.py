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
"""PyTorch Neural Attentive Circuit (arXiv 2210.08031), in the form used by m2mKD (arXiv 2402.16918)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from m2mkd.configuration.configuration_nac import NACConfig
from m2mkd.modeling.graph_losses import (
    block_model_graphon,
    block_model_loss,
    link_probability,
    signature_repulsion_loss,
)
from m2mkd.modeling.graph_priors import cosine_distance, signatures_for
from m2mkd.modeling.latent_pruning import prune_latents
from m2mkd.modeling.nac_latents import NACLatents, NACLatentSeeder, NACLogVariance
from m2mkd.modeling.nac_layers import (
    NACFeedForward,
    NACKernel,
    NACLatentAttention,
    NACModulatedHead,
    NACModulatedWeight,
    NACPooling,
    NACReadInAttention,
    add_code_noise,
)
from m2mkd.modeling.nac_tokenizer import NACImageTokenizer, NACTokenizerBlock, NACTokenizerLinear


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
        Attention weights of each round of messages, of shape `(batch_size, num_attention_heads, num_mediator_latents,
        num_senders)`.
    cross_attentions (`tuple(torch.FloatTensor)`, returned with `output_attentions=True`):
        Attention weights of the read-out: one tensor of shape `(batch_size, num_attention_heads, num_output_latents,
        num_senders)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`NACForImageClassification`].")
@dataclass
class NACImageClassifierOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, returned when `labels` is given):
        Cross entropy, plus `aux_loss` if there is one.
    logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
        Classification scores before the softmax.
    aux_loss (`torch.FloatTensor` of shape `()`, returned if the config gives a loss of the graph a weight):
        Weighted sum of `signature_repulsion_loss` and `block_model_loss`.
    signature_repulsion_loss (`torch.FloatTensor` of shape `()`, returned if the config gives it a weight):
        Unweighted hinge repulsion of the signatures.
    block_model_loss (`torch.FloatTensor` of shape `()`, returned if the config gives it a weight):
        Unweighted distance of the mediators' graph from the stochastic block model.
    cross_attentions (`tuple(torch.FloatTensor)`, returned with `output_attentions=True`):
        As in [`NACModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    signature_repulsion_loss: torch.FloatTensor | None = None
    block_model_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


class NACClassifier(nn.Linear):
    """Linear head whose bias is initialized to zero."""


# ---- The parts of a circuit ----


class NACReadIn(nn.Module):
    """Input latents read the image: attention, then feed-forward."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.code_noise_scale = config.code_noise_scale
        self.attention = NACReadInAttention(config)
        self.ffn = NACFeedForward(config, config.read_in_drop_path_rate)

    def forward(self, states: torch.Tensor, tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Apply attention and feed-forward; the arguments are those of [`NACReadInAttention`]."""
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
            sender_codes (`torch.Tensor` of shape `(num_senders, code_size)`): Codes of inputs and mediators, or of
                only the mediators if the inputs do not send.
            log_affinity (`torch.Tensor` of shape `(num_mediator_latents, num_senders)`): See [`NACKernel`].

        Returns:
            `torch.Tensor` of the same shape as `hidden_states`, with the input latents unchanged.
        """
        if self.training and self.code_noise_scale > 0:
            receiver_codes = add_code_noise(receiver_codes, self.code_noise_scale)
            sender_codes = add_code_noise(sender_codes, self.code_noise_scale)
        inputs, mediators = hidden_states[:, : self.num_input_latents], hidden_states[:, self.num_input_latents :]
        senders = hidden_states if log_affinity.shape[-1] == hidden_states.shape[1] else mediators
        bias = self.kernel.bias(log_affinity, hidden_states.shape[0])
        mediators, _ = self.attention(mediators, senders, receiver_codes, sender_codes, bias, **kwargs)
        return torch.cat((inputs, self.ffn(mediators, receiver_codes)), dim=1)


class NACReadOut(nn.Module):
    """Output latents read the states of the circuit: attention to all senders, then feed-forward."""

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
        Compute the new states of the output latents from states of shape `(batch_size, num_output_latents,
        hidden_size)`, senders of shape `(batch_size, num_senders, hidden_size)`, the codes of both, and the log
        affinity of shape `(num_output_latents, num_senders)`.
        """
        if self.training and self.code_noise_scale > 0:
            receiver_codes = add_code_noise(receiver_codes, self.code_noise_scale)
            sender_codes = add_code_noise(sender_codes, self.code_noise_scale)
        bias = self.kernel.bias(log_affinity, states.shape[0])
        states, _ = self.attention(states, senders, receiver_codes, sender_codes, bias, **kwargs)
        return self.ffn(states, receiver_codes)


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
    _can_record_outputs = {
        "hidden_states": NACPropagator,
        "attentions": OutputRecorder(NACLatentAttention, index=1, layer_name="layers"),
        "cross_attentions": OutputRecorder(NACLatentAttention, index=1, layer_name="read_out"),
    }
    _input_embed_layer = "tokenizer"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | NACTokenizerLinear):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            # the default of `torch.nn.Linear`, which the official code uses for these layers
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
            if isinstance(module, NACLogVariance):
                init.constant_(module.bias, -5.0)
            elif isinstance(module, NACClassifier):
                init.zeros_(module.bias)
        elif isinstance(module, NACTokenizerBlock):
            init.constant_(module.layer_scale, module.layer_scale_init_value)
        elif isinstance(module, NACImageTokenizer):
            if module.position_embeddings is not None:
                init.normal_(module.position_embeddings)
        elif isinstance(module, NACModulatedWeight):
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
        """
        Initialize the signatures, at random or from the graph prior. Loaded tensors are skipped, because the fit takes
        seconds.
        """
        config, signatures = self.config, latents.signatures
        if getattr(signatures, "_is_hf_initialized", False) or signatures.is_meta:
            return
        # CODEPATH: only for new models; every checkpoint contains its signatures
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
            f"Signatures fitted to the graph prior {config.graph_prior!r}: {100 * error:.3g} % of adjacency is wrong"
        )


@auto_docstring(custom_intro="The bare NAC, which returns the states of its output latents, without pooling and head.")
class NACModel(NACPreTrainedModel):
    def __init__(self, config: NACConfig):
        super().__init__(config)
        self.tokenizer = NACImageTokenizer(config)
        self.input_latents = NACLatents(config, config.num_input_latents)
        self.mediator_latents = NACLatents(config, config.num_mediator_latents, is_mediator=True)
        self.output_latents = NACLatents(config, config.num_output_latents)
        # CODEPATH: see `NACLatents`
        self.latent_seeder = NACLatentSeeder(config) if config.use_latent_seeder else None
        self.read_in = NACReadIn(config)
        self.layers = nn.ModuleList([NACPropagator(config) for _ in range(config.num_propagators)])
        self.read_out = NACReadOut(config)
        self._eval_affinities: tuple[tuple, list[torch.Tensor], list[torch.Tensor]] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokenizer

    def propagator(self, layer_idx: int) -> NACPropagator:
        """The module of one round of messages."""
        return self.layers[layer_idx % len(self.layers)]

    def inputs_send(self, layer_idx: int) -> bool:
        """Whether input latents send to the mediators in this round."""
        return {"all": True, "first": layer_idx == 0, "none": False}[self.config.input_to_mediator]

    def seed(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Initial states of input, mediator (`None` if they start as inputs) and output latents, for a batch."""

        def first_states(latents: NACLatents) -> torch.Tensor:
            _, codes, initial_states = latents()
            if self.latent_seeder is not None:
                return self.latent_seeder(codes, batch_size)
            return initial_states.expand(batch_size, -1, -1)

        inputs = first_states(self.input_latents)
        mediators = None
        # CODEPATH: mediators of m2mKD's checkpoints have their own initial states; the official option
        # `use_input_states_as_mediator_states` copies those of the inputs
        if not self.config.mediators_start_as_inputs:
            mediators = first_states(self.mediator_latents)
        return inputs, mediators, first_states(self.output_latents)

    def read(self, pixel_values: torch.Tensor, inputs: torch.Tensor, mediators: torch.Tensor | None) -> torch.Tensor:
        """Read the images; returns the hidden states for the propagators (see `NACModelOutput.hidden_states`)."""
        _, codes, _ = self.input_latents()
        inputs = self.read_in(inputs, self.tokenizer(pixel_values), codes)
        return torch.cat((inputs, inputs if mediators is None else mediators), dim=1)

    def propagate(
        self,
        hidden_states: torch.Tensor,
        layer_idx: int,
        log_affinity: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Run one round of messages; `log_affinity` as in [`NACPropagator`]."""
        _, codes, _ = self.mediator_latents(layer_idx)
        _, input_codes, _ = self.input_latents()
        sender_codes = torch.cat((input_codes, codes)) if self.inputs_send(layer_idx) else codes
        return self.propagator(layer_idx)(hidden_states, codes, sender_codes, log_affinity, **kwargs)

    def write(
        self,
        hidden_states: torch.Tensor,
        outputs: torch.Tensor,
        log_affinity: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Compute the final states of the output latents from their initial ones (the read-out)."""
        first = self.config.first_output_sender
        _, codes, _ = self.output_latents()
        sender_codes = torch.cat((self.input_latents()[1], self.mediator_latents(-1)[1]))[first:]
        return self.read_out(outputs, hidden_states[:, first:], codes, sender_codes, log_affinity, **kwargs)

    def log_affinities(self) -> list[torch.Tensor]:
        """
        Log affinities of senders and mediators in each round, followed by that of the read-out. They are computed once
        per distinct bandwidth. In evaluation they are reused by all forward passes until signatures or bandwidths
        change.
        """
        if torch.compiler.is_exporting() and not torch.is_grad_enabled():
            # ONNX traces a second time with gradients on, where a bias that requires a gradient would select another
            # attention kernel
            return [log_affinity.detach() for log_affinity in self._compute_log_affinities(by_value=False)]
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._compute_log_affinities(by_value=False)
        sources = [latents.signatures for latents in (self.input_latents, self.mediator_latents, self.output_latents)]
        sources += [kernel.bandwidth for kernel in (*(layer.kernel for layer in self.layers), self.read_out.kernel)]
        if any(source.is_inference() for source in sources):
            return self._compute_log_affinities(by_value=False)
        state = tuple((source.data_ptr(), source._version, source.dtype, source.device) for source in sources)
        if self._eval_affinities is None or self._eval_affinities[0] != state:
            # keep references to the sources, so that their addresses are not reused for other tensors
            held = [source.detach() for source in sources]
            self._eval_affinities = (state, held, self._compute_log_affinities(by_value=True))
        return self._eval_affinities[2]

    def _compute_log_affinities(self, by_value: bool) -> list[torch.Tensor]:
        config = self.config
        (inputs, *_), (mediators, *_) = self.input_latents(), self.mediator_latents()
        # in float32 even under autocast, because the truncation is a yes-or-no decision
        # (the meta device, on which a run is planned, does not support autocast)
        device_type = "cpu" if mediators.is_meta else mediators.device.type
        with torch.autocast(device_type=device_type, enabled=False):
            inputs, mediators = inputs.float(), mediators.float()
            senders = torch.cat((inputs, mediators))
            distance = cosine_distance(mediators, senders)
            known: dict[tuple, torch.Tensor] = {}
            affinities = []
            for layer_idx in range(config.num_hidden_layers):
                kernel, inputs_send = self.propagator(layer_idx).kernel, self.inputs_send(layer_idx)
                has_value = by_value and not kernel.bandwidth.is_meta
                key = (float(kernel.bandwidth) if has_value else id(kernel), inputs_send)
                if key not in known:
                    known[key] = kernel(distance if inputs_send else distance[:, len(inputs) :])
                affinities.append(known[key])
            outputs = self.output_latents()[0].float()
            distance = cosine_distance(outputs, senders[config.first_output_sender :])
            return [*affinities, self.read_out.kernel(distance)]

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
        # CODEPATH: m2mKD's checkpoints pool the states themselves, official `use_head: true` what a head makes of them
        self.latent_head = None if config.latent_head_size is None else NACModulatedHead(config, config.pooled_size)
        self.pooling = NACPooling(config) if is_pooled else None
        if config.num_labels == 0:
            self.classifier = nn.Identity()
        elif is_pooled:
            self.classifier = NACClassifier(config.pooled_size, config.num_labels)
        else:
            self.classifier = NACModulatedHead(config, config.num_labels)
        self.post_init()

    def classify(self, states: torch.Tensor, codes: torch.Tensor | None = None) -> torch.Tensor:
        """
        Compute logits from states of the output latents, `(batch_size, num_output_latents, hidden_size)`, with the
        codes of these latents or with `codes` of shape `(num_output_latents, code_size)`.
        """
        if codes is None:
            codes = self.nac.output_latents()[1]
        if self.latent_head is not None:
            states = self.latent_head(states, codes)
        if self.pooling is not None:
            return self.classifier(self.pooling(states))
        if self.num_labels == 0:
            return states[:, 0]
        return self.classifier(states[:, :1], codes[:1])[:, 0]

    def graph_losses(self) -> dict[str, torch.Tensor]:
        """
        The losses of the graph that have a weight in the config, by name, and their weighted sum `aux_loss`; `{}` if
        there are none. They depend on signatures and bandwidths, not on the images.
        """
        config, losses, aux_loss = self.config, {}, 0.0
        mediators = self.nac.mediator_latents.signatures.float()
        # CODEPATH: m2mKD regularizes its planted-partition NAC with the block model, the others with the repulsion
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
            # CODEPATH: m2mKD's checkpoints learn a bandwidth, and so a graph, per round; a fixed one gives one graph
            num_kernels = config.num_hidden_layers if config.learnable_bandwidth else 1
            kernels = [self.nac.propagator(layer_idx).kernel for layer_idx in range(num_kernels)]
            probabilities = [
                link_probability(
                    mediators, mediators, kernel.positive_bandwidth(), kernel.truncation, kernel.truncation_type
                )
                for kernel in kernels
            ]
            losses["block_model_loss"] = torch.stack([block_model_loss(p, graphon) for p in probabilities]).sum()
            aux_loss = aux_loss + config.block_model_coef * losses["block_model_loss"]
        return {"aux_loss": aux_loss, **losses} if losses else {}

    def prune_latents(
        self, keep: float, strategy: str = "connectivity", pixel_values: torch.Tensor | None = None
    ) -> "NACForImageClassification":
        """
        Create a smaller copy with only the highest-ranked mediator latents, in their old order, and everything else
        unchanged. The model itself does not change. The copy is saved and loaded like any other model.

        Args:
            keep (`int` or `float`):
                Mediators to keep: an `int` is their number, from 1; a `float` is their fraction, in (0, 1].
            strategy (`str`, *optional*, defaults to `"connectivity"`):
                `"connectivity"` ranks the latents by their expected number of edges in the graph of the signatures.
                `"importance"` ranks them by the effect of their messages on the predictions for some images.
            pixel_values (`torch.Tensor`, *optional*):
                The images for `"importance"`.

        Returns:
            `NACForImageClassification`: On the same device, in the same mode. Its config has no graph prior, and no
            block model loss if latents were removed.

        Raises:
            `ValueError`: `keep` or `strategy` is not one of the above, or `"importance"` gets no images.

        Example:

        ```python
        >>> from m2mkd import NACConfig, NACForImageClassification

        >>> model = NACForImageClassification(NACConfig.from_preset("tiny"))
        >>> model.prune_latents(keep=0.25).config.num_mediator_latents
        6

        ```"""
        return prune_latents(self, keep, strategy, pixel_values)

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
            cross_attentions=outputs.cross_attentions,
        )


__all__ = ["NACForImageClassification", "NACModel", "NACPreTrainedModel"]
