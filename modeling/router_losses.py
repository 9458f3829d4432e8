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
"""Auxiliary losses of routers."""

import torch
import torch.nn.functional as F


def importance_loss(router_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Squared coefficient of variation of the experts' importance, the sum of their softmax weights over the tokens
    (V-MoE paper, appendix A.2): `(std(Imp) / mean(Imp))^2`, with the population standard deviation.

    Args:
        router_logits (`torch.Tensor` of shape `(num_tokens, num_experts)`): Logits before the router noise.
    """
    return _squared_variation(F.softmax(router_logits.float(), dim=-1).sum(dim=0))


def load_loss(
    router_logits: torch.Tensor, noisy_router_logits: torch.Tensor, noise_std: float, num_experts_per_tok: int
) -> torch.Tensor:
    r"""
    Squared coefficient of variation of the experts' load (V-MoE paper, appendix A.3). The load of expert `i` is the
    mean over the tokens of the probability that it is selected when its noise is drawn again:
    `1 - Phi((threshold_k - logits_i) / noise_std)`, where `threshold_k` is the k-th largest noisy logit.

    Args:
        router_logits (`torch.Tensor` of shape `(num_tokens, num_experts)`): Logits before the router noise.
        noisy_router_logits (`torch.Tensor` of shape `(num_tokens, num_experts)`): Logits that selected the experts.
        noise_std (`float`): Standard deviation of the noise, in logits.
        num_experts_per_tok (`int`): Number of selected experts, k.

    Raises:
        `ValueError`: `noise_std` is not positive.
    """
    if noise_std <= 0:
        raise ValueError(f"The load loss needs router noise, so `noise_std` must be positive, but is {noise_std}.")
    threshold = noisy_router_logits.float().topk(num_experts_per_tok, dim=-1).values[:, -1:]
    chance = 1 - torch.special.ndtr((threshold - router_logits.float()) / noise_std)
    return _squared_variation(chance.mean(dim=0))


def _squared_variation(values: torch.Tensor) -> torch.Tensor:
    return values.var(correction=0) / values.mean() ** 2
