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
"""Pruning of a trained NAC: a smaller model with only the mediator latents that matter most."""

import copy
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def number_to_keep(keep: float, num_latents: int) -> int:
    """
    Convert `keep` to a number of latents.

    Args:
        keep (`int` or `float`): An `int` is the number itself, from 1 to `num_latents`; a `float` is a fraction of
            the latents, in (0, 1].
        num_latents (`int`): Number of latents of the model.

    Raises:
        `ValueError`: `keep` is outside its range.
    """
    if isinstance(keep, Integral) and not isinstance(keep, bool):
        if not 1 <= keep <= num_latents:
            raise ValueError(
                f"`keep` must be between 1 and the model's `num_mediator_latents`, {num_latents}, but is {keep}. To "
                "keep a fraction of them, give a float in (0, 1]."
            )
        return int(keep)
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep <= 1:
        raise ValueError(
            f"`keep` must be a number of latents (an int between 1 and `num_mediator_latents`, {num_latents}) or a "
            f"fraction of them (a float in (0, 1]), but is {keep!r}."
        )
    return max(1, round(keep * num_latents))


def connectivity(model: PreTrainedModel, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
    """
    Expected number of edges of each mediator. The affinities of the truncated kernel are the probabilities of the
    edges. They are summed over the outgoing edges (to mediators and outputs) and the incoming edges (from inputs and
    mediators) of all rounds. They depend only on the signatures, so no images are needed.

    Returns:
        `torch.Tensor` of shape `(num_mediator_latents,)`.
    """
    circuit = model.nac
    num_mediators = model.config.num_mediator_latents
    with torch.no_grad():
        *rounds, read_out = [log_affinity.exp() for log_affinity in circuit.log_affinities()]
        degree = read_out[:, -num_mediators:].sum(0)
        for affinity in rounds:
            degree = degree + affinity[:, -num_mediators:].sum(0) + affinity.sum(1)
    return degree


def importance(model: PreTrainedModel, pixel_values: torch.Tensor | None) -> torch.Tensor:
    """
    Effect of the messages of each mediator on the prediction. A gate multiplies the attention weights of the messages
    that a mediator sends before they are normalized, in all rounds and in the read-out. A gate of 1 is the unchanged
    model, and 0 is the model without the latent. The importance is the mean over the images of the absolute derivative
    of the prediction's log-odds with respect to the gate. It takes one forward and one backward pass, without labels.

    Returns:
        `torch.Tensor` of shape `(num_mediator_latents,)`.

    Raises:
        `ValueError`: there are no images, or the model has no classifier with two or more classes.
    """
    if pixel_values is None:
        raise ValueError(
            "`pixel_values` is None, but the strategy 'importance' needs images: give a batch, or use 'connectivity', "
            "which needs none."
        )
    if model.config.num_labels < 2:
        raise ValueError(
            "The strategy 'importance' needs a classifier with `num_labels` of at least 2, but `num_labels` is "
            f"{model.config.num_labels}. Use 'connectivity'."
        )
    is_training = model.training
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            pixel_values = pixel_values.to(model.device).clone()
            log_gates = torch.zeros(
                len(pixel_values), 1, model.config.num_mediator_latents, device=model.device, requires_grad=True
            )
            logits = gated_logits(model, pixel_values, log_gates).float()
            top, best = logits.max(dim=-1, keepdim=True)
            others = logits.scatter(-1, best, -torch.inf)
            (gradient,) = torch.autograd.grad((top[:, 0] - others.logsumexp(dim=-1)).sum(), log_gates)
    finally:
        model.train(is_training)
    return gradient[:, 0].abs().mean(0)


def gated_logits(model: PreTrainedModel, pixel_values: torch.Tensor, log_gates: torch.Tensor) -> torch.Tensor:
    """
    Logits of a model with gates on the messages of its mediators.

    Args:
        model (`NACForImageClassification`)
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`)
        log_gates (`torch.Tensor` of shape `(batch_size, 1, num_mediator_latents)`): Logarithms of the gates: 0 for an
            open gate and minus infinity for a closed one.
    """
    circuit = model.nac

    def gated(log_affinity: torch.Tensor) -> torch.Tensor:
        num_inputs = log_affinity.shape[-1] - log_gates.shape[-1]
        return log_affinity + torch.cat((log_gates.new_zeros(len(log_gates), 1, num_inputs), log_gates), dim=-1)

    inputs, mediators, outputs = circuit.seed(len(pixel_values))
    *rounds, read_out = [gated(log_affinity) for log_affinity in circuit.log_affinities()]
    hidden_states = circuit.read(pixel_values, inputs, mediators)
    for layer_idx, log_affinity in enumerate(rounds):
        hidden_states = circuit.propagate(hidden_states, layer_idx, log_affinity)
    return model.classify(circuit.write(hidden_states, outputs, read_out))


STRATEGIES: dict[str, Callable[[PreTrainedModel, torch.Tensor | None], torch.Tensor]] = {
    "connectivity": connectivity,
    "importance": importance,
}


def ranked_mediators(model: PreTrainedModel, strategy: str, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
    """
    Indices of the mediators, best first. If two have the same score, the lower index comes first.

    Raises:
        `ValueError`: the strategy is unknown, or it needs images and gets none.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {sorted(STRATEGIES)}, but is {strategy!r}.")
    return torch.argsort(STRATEGIES[strategy](model, pixel_values), descending=True, stable=True)


def with_mediators(model: PreTrainedModel, kept: torch.Tensor) -> PreTrainedModel:
    """
    Create a model with only some of the mediators: their signatures, codes and initial states, in their old order.

    Args:
        model (`NACForImageClassification`)
        kept (`torch.Tensor`): Indices of the mediators.

    Raises:
        `ValueError`: the mediators of the model start as its inputs, so it needs as many mediators as inputs.
    """
    config = pruned_config(model.config, len(kept))
    kept = kept.sort().values
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        is_mediator = name.startswith("nac.mediator_latents.")
        # the latents are the second to last dimension; codes may have a dimension of layers before it
        state[name] = tensor.index_select(-2, kept.to(tensor.device)) if is_mediator else tensor.clone()
    with torch.device("meta"):
        pruned = type(model)(config)
    pruned.load_state_dict(state, strict=True, assign=True)
    for (_, old), (_, new) in zip(model.named_parameters(), pruned.named_parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return pruned.train(model.training)


def pruned_config(config: Any, num_mediators: int) -> Any:
    """The configuration with fewer mediators, without the fields that describe the graph of all mediators."""
    pruned = copy.deepcopy(config)
    pruned.graph_prior, pruned.graph_prior_kwargs = None, {}
    if num_mediators == config.num_mediator_latents:
        return pruned
    if config.mediators_start_as_inputs:
        raise ValueError(
            "A model with `mediators_start_as_inputs` needs as many mediators as input latents "
            f"({config.num_input_latents}), so `keep` must keep all mediators, but it keeps {num_mediators}."
        )
    if config.block_model_coef > 0:
        logger.warning(
            "The pruned model has `block_model_coef` 0, because its mediators no longer fill the blocks of equal size "
            "that the block model loss needs."
        )
        pruned.block_model_coef = 0.0
    pruned.num_mediator_latents = num_mediators
    pruned.validate()
    return pruned


def prune_latents(
    model: PreTrainedModel,
    keep: float,
    strategy: str = "connectivity",
    pixel_values: torch.Tensor | None = None,
) -> PreTrainedModel:
    """Prune a model; see [`NACForImageClassification.prune_latents`]."""
    number = number_to_keep(keep, model.config.num_mediator_latents)
    return with_mediators(model, ranked_mediators(model, strategy, pixel_values)[:number])
