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
"""Neural Attentive Circuit (NAC) model configuration."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import auto_docstring

from m2mkd.configuration.graph_prior_rules import check_graph_prior


# The two sizes of m2mKD (its configs/nac_scale_*.yml) with their scale-free graph, and a small size for tests.
NAC_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 32,
        "hidden_size": 48,
        "code_size": 32,
        "signature_size": 16,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "position_embedding_size": 8,
        "num_input_latents": 8,
        "num_mediator_latents": 24,
        "num_output_latents": 4,
    },
    "tiny_imagenet": {
        "graph_prior": "barabasi_albert",
        "graph_prior_kwargs": {"m": 2},
        "signature_repulsion_coef": 0.1,
    },
    "imagenet": {
        "image_size": 224,
        "hidden_size": 512,
        "code_size": 512,
        "num_attention_heads": 8,
        "intermediate_size": 512,
        "num_input_latents": 192,
        "num_mediator_latents": 768,
        "graph_prior": "barabasi_albert",
        "graph_prior_kwargs": {"m": 6},
        "signature_repulsion_coef": 0.1,
    },
}

# Stride of the stem in pixels: it cuts patches of 4 x 4, and every further stage halves the grid.
STEM_STRIDE = 4


@auto_docstring(
    custom_intro="""
    Configuration of a Neural Attentive Circuit ([Neural Attentive Circuits](https://huggingface.co/papers/2210.08031)):
    input latents read the image, mediator latents exchange messages along a learned sparse graph, and output latents
    are pooled into logits. The defaults are those of the NAC for Tiny-ImageNet of
    [m2mKD](https://huggingface.co/papers/2402.16918), without its graph prior.
    """
)
@strict
class NACConfig(PreTrainedConfig):
    r"""
    code_size (`int`, *optional*, defaults to 384):
        Width of the codes, the vectors that modulate the computation of each latent.
    signature_size (`int`, *optional*, defaults to 64):
        Width of the signatures, the vectors whose cosine distances define the graph.
    num_input_latents (`int`, *optional*, defaults to 64):
        Number of latents that attend to the image.
    num_mediator_latents (`int`, *optional*, defaults to 256):
        Number of latents that exchange messages.
    num_output_latents (`int`, *optional*, defaults to 64):
        Number of latents that the logits are pooled from.
    num_hidden_layers (`int`, *optional*, defaults to 8):
        Number of propagators. Each one is a round of messages.
    head_dim (`int`, *optional*):
        Width of an attention head; `hidden_size // num_attention_heads` if not given. No other value is allowed.
    use_geglu (`bool`, *optional*, defaults to `True`):
        Whether the feed-forward gates its hidden units (`a * gelu(gate)`) or is a plain two-layer perceptron.
    layer_scale_init_value (`float`, *optional*, defaults to 0.1):
        Initial value of the layer scale of propagators, read-out and all feed-forwards.
    read_in_layer_scale_init_value (`float`, *optional*, defaults to 1.0):
        Initial value of the layer scale of the read-in attention.
    drop_path_rate (`float`, *optional*, defaults to 0.1):
        Stochastic depth rate of every propagator.
    read_in_drop_path_rate (`float`, *optional*, defaults to 0.0):
        Stochastic depth rate of the read-in's feed-forward.
    read_out_drop_path_rate (`float`, *optional*, defaults to 0.0):
        Stochastic depth rate of the read-out.
    tokenizer_depths (`list[int]`, *optional*, defaults to `[3, 3]`):
        Number of ConvNeXt blocks in each stage of the image tokenizer. The grid is `image_size / 4`, halved by every
        further stage.
    tokenizer_hidden_sizes (`list[int]`, *optional*):
        Channels of each stage; `hidden_size // 4, hidden_size // 2, ...` if not given.
    tokenizer_layer_scale_init_value (`float`, *optional*, defaults to 1e-06):
        Initial value of the layer scale of the ConvNeXt blocks.
    position_embedding_size (`int`, *optional*, defaults to 64):
        Channels of the learned positional grid, which follow the image channels in every token; 0: no grid.
    learnable_signatures (`bool`, *optional*, defaults to `True`):
        Whether training changes the signatures, and with them the graph.
    code_scale_gain (`float`, *optional*, defaults to 0.1):
        Initial strength with which a code modulates the inputs of a linear layer.
    learnable_code_scale_gain (`bool`, *optional*, defaults to `True`):
        Whether each linear layer learns its gain.
    code_scale_normalization (`str`, *optional*, defaults to `"layer_norm"`):
        What a projected code passes before the gain: `"layer_norm"`, `"l2"` (a vector of length 1), `"sigmoid"`,
        `"tanh"` or `"none"`.
    add_one_to_code_scale (`bool`, *optional*, defaults to `True`):
        Whether a modulated linear layer starts from the identity modulation.
    code_noise_scale (`float`, *optional*, defaults to 0.05):
        Scale of the uniform noise on the codes in training, relative to their size.
    use_code_noise_in_latent_seeder (`bool`, *optional*, defaults to `True`):
        Whether the seeder also sees the noisy codes.
    kernel_truncation (`float`, *optional*, defaults to 0.9):
        Cosine distance (0 to 2) beyond which two latents are not connected; `None` connects all.
    kernel_truncation_type (`str`, *optional*, defaults to `"direct"`):
        `"direct"` passes no gradient through the edges that it cuts. `"masked"` passes the gradient of the block model
        loss straight through, and also cuts edges exactly at the truncation.
    kernel_bandwidth (`float`, *optional*, defaults to 1.0):
        Initial bandwidth of the affinity `exp(-distance / bandwidth)`. A learned bandwidth counts as at least 0.01.
    learnable_bandwidth (`bool`, *optional*, defaults to `True`):
        Whether each propagator learns its bandwidth.
    stochastic_kernel (`bool`, *optional*, defaults to `True`):
        Whether training draws the edges for every image from a relaxed Bernoulli distribution of the affinity.
    kernel_temperature (`float`, *optional*, defaults to 0.5):
        Temperature of the relaxed Bernoulli distribution.
    share_layernorm (`bool`, *optional*, defaults to `True`):
        Whether senders and receivers of a propagator share a layer norm.
    share_propagators (`bool`, *optional*, defaults to `False`):
        Whether all rounds use the weights of one propagator.
    share_codes_between_layers (`bool`, *optional*, defaults to `True`):
        Whether a mediator keeps its code over the rounds.
    use_latent_seeder (`bool`, *optional*, defaults to `True`):
        Whether the initial state of a latent is computed from its code. Otherwise it is a learned parameter.
    use_state_noise (`bool`, *optional*, defaults to `True`):
        Whether the seeder adds learned Gaussian noise to the initial states in training.
    input_to_mediator (`str`, *optional*, defaults to `"all"`):
        Rounds in which input latents send to the mediators: `"all"`, `"first"` or `"none"`.
    input_to_output (`bool`, *optional*, defaults to `True`):
        Whether the read-out sees the input latents in addition to the mediators.
    mediators_start_as_inputs (`bool`, *optional*, defaults to `False`):
        Whether the result of the read-in is the initial state of the mediators. It needs as many mediators as input
        latents.
    read_in_residual (`bool`, *optional*, defaults to `True`):
        Whether the read-in attention adds to the input latents or replaces them.
    read_out_residual (`bool`, *optional*, defaults to `False`):
        Whether the read-out attention adds to the output latents or replaces them.
    pooling (`str`, *optional*, defaults to `"gumbel"`):
        How confidences weigh the output latents: `"gumbel"`, `"gumbel_hard"` (one latent per image) or `"softmax"`.
        With `"first"`, a modulated head computes the logits from the first output latent.
    pooling_temperature (`float`, *optional*, defaults to 1.0):
        Temperature of the pooling softmax.
    latent_head_size (`int`, *optional*):
        Output width of a modulated head that is applied to every output latent before the pooling; no such head if not
        given. With `pooling="first"`, the head computes the logits, and this must not be given.
    head_layernorm (`bool`, *optional*, defaults to `True`):
        Whether a modulated head, of `pooling="first"` or of `latent_head_size`, begins with a layer norm.
    sample_in_eval (`bool`, *optional*, defaults to `False`):
        Whether evaluation draws seeder and Gumbel noise, as the official code does (two evaluations of one
        model then differ).
    graph_prior (`str`, *optional*):
        Graph that the signatures of the mediators are fitted to when a new model is created: `"barabasi_albert"`
        (scale-free), `"planted_partition"`, `"ring_of_cliques"`, `"erdos_renyi"`, `"watts_strogatz"`, `"grid"`,
        `"balanced_tree"`, `"barbell"`, `"hypercube"` or `"complete"`. `None`: random signatures.
    graph_prior_kwargs (`dict`, *optional*):
        Arguments of the graph prior, named as in networkx, without the number of nodes.
    graph_prior_seed (`int`, *optional*, defaults to 0):
        Seed of the graph.
    graph_prior_truncation (`float`, *optional*):
        Distance at which the fitted signatures reproduce the graph; `kernel_truncation` if not given. The official
        code fits at 0.8 and cuts at 0.9, which turns a graph of 1.6 % density into one of 21 %. Set 0.8
        only to reproduce that.
    signature_repulsion_coef (`float`, *optional*, defaults to 0.0):
        Weight of the hinge repulsion of all signatures in `aux_loss`.
    signature_repulsion_hinge (`float`, *optional*, defaults to 0.4):
        Distance below which two signatures repel each other.
    block_model_coef (`float`, *optional*, defaults to 0.0):
        Weight of the stochastic block model loss of the mediators in `aux_loss`.
    block_model_num_clusters (`int`, *optional*, defaults to 8):
        Number of blocks of the stochastic block model.
    block_model_p_in (`float`, *optional*, defaults to 0.9):
        Link probability within a block.
    block_model_p_out (`float`, *optional*, defaults to 0.2):
        Link probability between blocks.

    Example:

    ```python
    >>> from m2mkd import NACConfig, NACForImageClassification

    >>> config = NACConfig.from_preset("tiny", graph_prior="ring_of_cliques",
    ...     graph_prior_kwargs={"num_cliques": 4, "clique_size": 6}, num_labels=10)
    >>> model = NACForImageClassification(config)
    >>> model.config.num_mediator_latents
    24

    ```"""

    model_type = "nac"
    keys_to_ignore_at_inference = [
        "hidden_states",
        "attentions",
        "cross_attentions",
        "aux_loss",
        "signature_repulsion_loss",
        "block_model_loss",
    ]

    image_size: int | list[int] | tuple[int, int] = 64
    num_channels: int = 3
    hidden_size: int = 384
    code_size: int = 384
    signature_size: int = 64
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    head_dim: int | None = None
    intermediate_size: int = 768
    hidden_act: str = "gelu"
    use_geglu: bool = True
    qkv_bias: bool = False
    layer_norm_eps: float = 1e-5
    layer_scale_init_value: float | int = 0.1
    read_in_layer_scale_init_value: float | int = 1.0
    drop_path_rate: float | int = 0.1
    read_in_drop_path_rate: float | int = 0.0
    read_out_drop_path_rate: float | int = 0.0
    tokenizer_depths: list[int] | None = None
    tokenizer_hidden_sizes: list[int] | None = None
    tokenizer_layer_scale_init_value: float = 1e-6
    position_embedding_size: int = 64
    num_input_latents: int = 64
    num_mediator_latents: int = 256
    num_output_latents: int = 64
    learnable_signatures: bool = True
    code_scale_gain: float | int = 0.1
    learnable_code_scale_gain: bool = True
    code_scale_normalization: Literal["layer_norm", "l2", "sigmoid", "tanh", "none"] = "layer_norm"
    add_one_to_code_scale: bool = True
    code_noise_scale: float | int = 0.05
    use_code_noise_in_latent_seeder: bool = True
    kernel_truncation: float | int | None = 0.9
    kernel_truncation_type: Literal["direct", "masked"] = "direct"
    kernel_bandwidth: float | int = 1.0
    learnable_bandwidth: bool = True
    stochastic_kernel: bool = True
    kernel_temperature: float | int = 0.5
    share_layernorm: bool = True
    share_propagators: bool = False
    share_codes_between_layers: bool = True
    use_latent_seeder: bool = True
    use_state_noise: bool = True
    input_to_mediator: Literal["all", "first", "none"] = "all"
    input_to_output: bool = True
    mediators_start_as_inputs: bool = False
    read_in_residual: bool = True
    read_out_residual: bool = False
    pooling: Literal["gumbel", "gumbel_hard", "softmax", "first"] = "gumbel"
    pooling_temperature: float | int = 1.0
    latent_head_size: int | None = None
    head_layernorm: bool = True
    sample_in_eval: bool = False
    graph_prior: str | None = None
    graph_prior_kwargs: dict[str, Any] | None = None
    graph_prior_seed: int = 0
    graph_prior_truncation: float | int | None = None
    signature_repulsion_coef: float | int = 0.0
    signature_repulsion_hinge: float | int = 0.4
    block_model_coef: float | int = 0.0
    block_model_num_clusters: int = 8
    block_model_p_in: float | int = 0.9
    block_model_p_out: float | int = 0.2
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        self.tokenizer_depths = [3, 3] if self.tokenizer_depths is None else list(self.tokenizer_depths)
        if self.tokenizer_hidden_sizes is None:
            self.tokenizer_hidden_sizes = [
                self.hidden_size * 2**stage // 4 for stage in range(len(self.tokenizer_depths))
            ]
        self.graph_prior_kwargs = dict(self.graph_prior_kwargs or {})
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "NACConfig":
        """
        Create a configuration of a known size: `"tiny"` (for tests and laptops), or the paper's `"tiny_imagenet"` and
        `"imagenet"` with the scale-free graph. Set `graph_prior` and `graph_prior_kwargs` for another graph.

        Args:
            name (`str`): Name of the preset.
            overrides: Fields that differ from the preset, e.g. `num_labels=200`.

        Raises:
            `ValueError`: there is no preset with this name.
        """
        if name not in NAC_PRESETS:
            raise ValueError(f"There is no NAC preset '{name}'; choose one of {sorted(NAC_PRESETS)}.")
        return cls(**{**NAC_PRESETS[name], **overrides})

    @property
    def token_stride(self) -> int:
        """Distance between two tokens of the image tokenizer, in pixels."""
        return STEM_STRIDE * 2 ** (len(self.tokenizer_depths) - 1)

    @property
    def num_propagators(self) -> int:
        """Number of propagators with their own weights."""
        return 1 if self.share_propagators else self.num_hidden_layers

    @property
    def first_output_sender(self) -> int:
        """Index of the first latent (inputs, then mediators) that sends to the read-out."""
        return 0 if self.input_to_output else self.num_input_latents

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output latents, which the classifier of every `pooling` but `"first"` takes."""
        return self.hidden_size if self.latent_head_size is None else self.latent_head_size

    @property
    def token_size(self) -> int:
        """Width of the tokens that the read-in attends to: image channels, then position channels."""
        return self.tokenizer_hidden_sizes[-1] + self.position_embedding_size

    def validate_sizes(self) -> None:
        """Check the sizes that must be positive or match each other."""
        positive = (
            "hidden_size code_size signature_size num_hidden_layers num_attention_heads intermediate_size "
            "num_channels num_input_latents num_mediator_latents num_output_latents"
        )
        for field in positive.split():
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, but is {getattr(self, field)}.")
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"`num_attention_heads` times `head_dim` must be `hidden_size`, but {self.num_attention_heads} times "
                f"{self.head_dim} is not {self.hidden_size}."
            )
        if self.latent_head_size is not None and (self.latent_head_size < 1 or self.pooling == "first"):
            raise ValueError(
                "`latent_head_size` must be at least 1 and needs a `pooling` other than 'first', but is "
                f"{self.latent_head_size} with `pooling` {self.pooling!r}."
            )
        if self.mediators_start_as_inputs and self.num_input_latents != self.num_mediator_latents:
            raise ValueError(
                "`mediators_start_as_inputs` needs as many mediators as input latents, but `num_mediator_latents` is "
                f"{self.num_mediator_latents} and `num_input_latents` is {self.num_input_latents}."
            )

    def validate_tokenizer(self) -> None:
        """Check the image tokenizer: every stage needs channels, and an image must consist of whole tokens."""
        depths, sizes = self.tokenizer_depths, self.tokenizer_hidden_sizes
        if not depths or any(depth < 0 for depth in depths):
            raise ValueError(f"`tokenizer_depths` must have at least one stage of 0 or more blocks, but is {depths}.")
        if len(sizes) != len(depths) or any(size < 1 for size in sizes):
            raise ValueError(
                "`tokenizer_hidden_sizes` must have a number of channels, at least 1, for every stage of "
                f"`tokenizer_depths` {depths}, but is {sizes}."
            )
        if self.position_embedding_size < 0:
            raise ValueError(f"`position_embedding_size` must not be negative, but is {self.position_embedding_size}.")
        image_size = self.image_size if isinstance(self.image_size, list | tuple) else [self.image_size]
        if any(size < 1 or size % self.token_stride for size in image_size):
            raise ValueError(
                f"`image_size` must be a positive multiple of {self.token_stride}, the distance between two tokens in "
                f"pixels, but is {self.image_size}."
            )

    def validate_rates(self) -> None:
        """Check the probabilities, the noise and the temperatures."""
        for field in ("drop_path_rate", "read_in_drop_path_rate", "read_out_drop_path_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be in [0, 1), but is {getattr(self, field)}.")
        for field in ("code_noise_scale", "signature_repulsion_coef", "block_model_coef"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"`{field}` must not be negative, but is {getattr(self, field)}.")
        for field in ("kernel_bandwidth", "kernel_temperature", "pooling_temperature"):
            if not getattr(self, field) > 0:
                raise ValueError(f"`{field}` must be positive, but is {getattr(self, field)}.")

    def validate_graph(self) -> None:
        """Check the truncations, which are cosine distances, and the graph, which has one node per mediator."""
        for field in ("kernel_truncation", "graph_prior_truncation", "signature_repulsion_hinge"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 2:
                raise ValueError(f"`{field}` is a cosine distance and must be in (0, 2], but is {value}.")
        check_graph_prior(self.graph_prior, self.graph_prior_kwargs, self.num_mediator_latents)
        if self.graph_prior not in (None, "complete") and self.fit_truncation is None:
            raise ValueError(
                f"`graph_prior` is {self.graph_prior!r}, but `kernel_truncation` is None: without a truncation every "
                "latent is connected to every other. Set `kernel_truncation`, or leave `graph_prior` out."
            )
        for field in ("block_model_p_in", "block_model_p_out"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"`{field}` is a probability and must be in [0, 1], but is {getattr(self, field)}.")
        if self.block_model_coef > 0 and (
            self.block_model_num_clusters < 1 or self.num_mediator_latents % self.block_model_num_clusters
        ):
            raise ValueError(
                "`num_mediator_latents` must be a multiple of `block_model_num_clusters`, but "
                f"{self.num_mediator_latents} is not a multiple of {self.block_model_num_clusters}."
            )

    @property
    def fit_truncation(self) -> float | None:
        """The distance at which fitted signatures reproduce the graph prior."""
        return self.kernel_truncation if self.graph_prior_truncation is None else self.graph_prior_truncation


__all__ = ["NAC_PRESETS", "NACConfig"]
