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
"""Outputs of the V-MoE models."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BackboneOutput, ModelOutput
from transformers.utils import auto_docstring


@auto_docstring(custom_intro="Output of [`VMoEModel`].")
@dataclass
class VMoEModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_patches + 1, hidden_size)`):
        Hidden states after the final layer norm; the class token comes first.
    router_logits (`tuple(torch.FloatTensor)`, returned with `output_router_logits=True`):
        One tensor per sparse layer, before any router noise, of shape `(batch_size * (num_patches + 1), num_experts)`
        for token choice without a capacity or a group size, else `(num_groups, group_size, num_experts)` (`num_experts
        * num_slots` for soft, the experts of one member in an ensemble).
    noisy_router_logits (`tuple(torch.FloatTensor)`, returned with `output_noisy_router_logits=True`):
        Logits after the router noise, which selected the experts.
    dropped_mask (`tuple(torch.BoolTensor)`, returned with `output_dropped_mask=True` if the router can drop tokens):
        One mask per sparse layer: the choices over the capacity, of shape `(num_groups, group_size,
        num_experts_per_tok)`, or for expert choice the tokens that no expert has taken, of shape `(num_groups,
        group_size)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    noisy_router_logits: tuple[torch.FloatTensor, ...] | None = None
    dropped_mask: tuple[torch.BoolTensor, ...] | None = None


@auto_docstring(custom_intro="Output of [`VMoEForImageClassification`].")
@dataclass
class VMoEImageClassifierOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, returned when `labels` is given):
        Cross entropy, plus `aux_loss` if there is one.
    logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
        Classification scores before the softmax; for an ensemble the logarithm of its members' mean probabilities.
    member_logits (`torch.FloatTensor` of shape `(batch_size, num_members, num_labels)`, returned by ensembles):
        Classification scores of each member.
    aux_loss (`torch.FloatTensor` of shape `()`, returned if the config gives a balance loss a weight):
        Weighted sum of `importance_loss`, `load_loss` and `gshard_loss`, averaged over the sparse layers.
    importance_loss (`torch.FloatTensor` of shape `()`, returned with `aux_loss`):
        Unweighted importance loss, averaged over the sparse layers.
    load_loss (`torch.FloatTensor` of shape `()`, returned with `aux_loss` if the config gives it a weight):
        Unweighted load loss, averaged over the sparse layers.
    gshard_loss (`torch.FloatTensor` of shape `()`, returned with `aux_loss` if the config gives it a weight):
        Unweighted GShard loss, averaged over the sparse layers.
    dropped (`torch.FloatTensor` of shape `(num_sparse_layers,)`, returned if the router can drop tokens):
        Fraction of the tokens' choices for which the experts had no room; for expert choice, of the tokens that no
        expert has taken.
    router_logits (`tuple(torch.FloatTensor)`, returned with `output_router_logits=True`):
        As in [`VMoEModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    importance_loss: torch.FloatTensor | None = None
    load_loss: torch.FloatTensor | None = None
    gshard_loss: torch.FloatTensor | None = None
    dropped: torch.FloatTensor | None = None
    member_logits: torch.FloatTensor | None = None
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


def mean_of_members(member_logits: torch.Tensor) -> torch.Tensor:
    """
    Logarithm of the mean of the members' probabilities (E3, arXiv 2110.03360, section 3).

    Args:
        member_logits (`torch.Tensor` of shape `(batch_size, num_members, num_labels)`)
    """
    return torch.logsumexp(F.log_softmax(member_logits, dim=-1), dim=1) - math.log(member_logits.shape[1])


def dropped_fractions(dropped_mask: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Fraction of each mask, of shape `(num_sparse_layers,)`."""
    return torch.stack([mask.float().mean() for mask in dropped_mask])
