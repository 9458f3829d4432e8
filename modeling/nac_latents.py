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
"""Latents of a Neural Attentive Circuit: signatures, codes and initial states."""

import torch
from torch import nn

from m2mkd.configuration.configuration_nac import NACConfig
from m2mkd.modeling.nac_layers import add_code_noise


class NACLatents(nn.Module):
    """
    A set of latents: signatures (the position of each latent in the graph), codes (the computation of each latent)
    and, without a seeder, the initial states.
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
        # CODEPATH: m2mKD's checkpoints compute initial states from codes; official `use_latent_seeder: false` stores
        # them
        if not config.use_latent_seeder and not (is_mediator and config.mediators_start_as_inputs):
            self.initial_states = nn.Parameter(torch.empty(num_latents, config.hidden_size))

    def layer_codes(self, layer_idx: int) -> torch.Tensor:
        """Codes of shape `(num_latents, code_size)` in one round of messages; -1 is the last round."""
        return self.codes[layer_idx] if self.codes.dim() == 3 else self.codes

    def forward(self, layer_idx: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Signatures, codes in one round of messages, and initial states. The model gets them by a forward call instead
        of reading the attributes, because offloaded or sharded weights are loaded by a forward call.
        """
        return self.signatures, self.layer_codes(layer_idx), self.initial_states


class NACLogVariance(nn.Linear):
    """Logarithm of the seeder's variance. The initial standard deviation is about `exp(-2.5)`."""


class NACLatentSeeder(nn.Module):
    """Computes the initial state of each latent from its code, in training with noise of a learned scale."""

    def __init__(self, config: NACConfig):
        super().__init__()
        # CODEPATH: all checkpoints of m2mKD were trained with this noise; an option of the official code omits it
        self.code_noise_scale = config.code_noise_scale if config.use_code_noise_in_latent_seeder else 0.0
        self.sample_in_eval = config.sample_in_eval
        self.layernorm = nn.LayerNorm(config.code_size, eps=config.layer_norm_eps)
        self.mean = nn.Linear(config.code_size, config.hidden_size)
        # CODEPATH: m2mKD's checkpoints have the noise; those of the official `use_state_noise: false` lack its weights
        self.log_variance = NACLogVariance(config.code_size, config.hidden_size) if config.use_state_noise else None

    def forward(self, codes: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Map `(num_latents, code_size)` to `(batch_size, num_latents, hidden_size)`."""
        if self.training and self.code_noise_scale > 0:
            codes = add_code_noise(codes, self.code_noise_scale)
        codes = self.layernorm(codes)
        mean = self.mean(codes)
        if self.log_variance is None or not (self.training or self.sample_in_eval):
            return mean.expand(batch_size, -1, -1)
        std = (0.5 * self.log_variance(codes)).exp()
        return mean + std * torch.randn(batch_size, *mean.shape, dtype=mean.dtype, device=mean.device)
