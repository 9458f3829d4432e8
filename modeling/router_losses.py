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
"""
Auxiliary losses of routers. Logits have the shape `(..., num_tokens, num_experts)`: the losses are those of each group
of `num_tokens` tokens, averaged over the groups.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from m2mkd.configuration.configuration_vmoe import VMoEConfig


def importance_loss(router_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Squared coefficient of variation of the experts' importance, the sum of their softmax weights over the tokens
    (V-MoE paper, appendix A.2): `(std(Imp) / mean(Imp))^2`, with the population standard deviation.

    Args:
        router_logits (`torch.Tensor` of shape `(..., num_tokens, num_experts)`): Logits before the router noise.
    """
    return _squared_variation(F.softmax(router_logits.float(), dim=-1).sum(dim=-2))


def load_loss(
    router_logits: torch.Tensor, noisy_router_logits: torch.Tensor, noise_std: float, num_experts_per_tok: int
) -> torch.Tensor:
    r"""
    Squared coefficient of variation of the experts' load (V-MoE paper, appendix A.3). The load of expert `i` is the
    mean over the tokens of the probability that it is selected when its noise is drawn again:
    `1 - Phi((threshold_k - logits_i) / noise_std)`, where `threshold_k` is the k-th largest noisy logit.

    Args:
        router_logits (`torch.Tensor` of shape `(..., num_tokens, num_experts)`): Logits before the router noise.
        noisy_router_logits (`torch.Tensor` of shape `(..., num_tokens, num_experts)`): Logits that selected the
            experts.
        noise_std (`float`): Standard deviation of the noise, in logits.
        num_experts_per_tok (`int`): Number of selected experts, k.

    Raises:
        `ValueError`: `noise_std` is not positive.
    """
    if noise_std <= 0:
        raise ValueError(f"The load loss needs router noise, so `noise_std` must be positive, but is {noise_std}.")
    threshold = noisy_router_logits.float().topk(num_experts_per_tok, dim=-1).values[..., -1:]
    chance = 1 - torch.special.ndtr((threshold - router_logits.float()) / noise_std)
    return _squared_variation(chance.mean(dim=-2))


def gshard_loss(noisy_router_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Balance loss of GShard (arXiv 2006.16868, section 2.2, algorithm 1): `num_experts^2 * mean_i(f_i * g_i)`, where
    `f_i` is the fraction of the tokens whose first choice is expert `i` (a constant for the gradient), and `g_i` the
    mean of its softmax weight.

    Args:
        noisy_router_logits (`torch.Tensor` of shape `(..., num_tokens, num_experts)`): Logits that selected the
            experts.
    """
    num_experts = noisy_router_logits.shape[-1]
    gates = F.softmax(noisy_router_logits.float(), dim=-1)
    first = F.one_hot(gates.argmax(dim=-1), num_experts).to(gates.dtype)
    return num_experts**2 * (first.mean(dim=-2) * gates.mean(dim=-2)).mean()


def _squared_variation(values: torch.Tensor) -> torch.Tensor:
    return (values.var(dim=-1, correction=0) / values.mean(dim=-1) ** 2).mean()


def has_balance_loss(config: PreTrainedConfig) -> bool:
    """Whether `config` belongs to a V-MoE and gives a balance loss a weight."""
    if not isinstance(config, VMoEConfig):
        return False
    weights = (config.router_importance_loss_coef, config.router_load_loss_coef, config.router_gshard_loss_coef)
    return len(config.moe_layers) > 0 and max(weights) > 0


def balance_losses(
    router_logits: tuple[torch.Tensor, ...], noisy_router_logits: tuple[torch.Tensor, ...], config: VMoEConfig
) -> dict[str, torch.Tensor]:
    """
    The balance losses that have a weight in `config`, by name, averaged over the sparse layers, the groups of tokens
    and the members of an ensemble (V-MoE paper, appendix A).

    Args:
        router_logits (`tuple(torch.Tensor)`): One tensor of shape `(..., num_tokens, num_experts)` per sparse layer.
        noisy_router_logits (`tuple(torch.Tensor)`): The logits that selected the experts, with the same shapes.

    Returns:
        `aux_loss` (weighted sum), `importance_loss`, and `load_loss` and `gshard_loss` if they have a weight.
    """
    members = config.num_ensemble_members
    if members > 1:
        router_logits, noisy_router_logits = (
            [layer.unflatten(-2, (-1, members)).transpose(-3, -2) for layer in logits]
            for logits in (router_logits, noisy_router_logits)
        )
    losses = {"importance_loss": torch.stack([importance_loss(logits) for logits in router_logits]).mean()}
    aux_loss = config.router_importance_loss_coef * losses["importance_loss"]
    # CODEPATH: Google's V-MoE checkpoints were trained with the load loss, m2mKD's without
    if config.router_load_loss_coef > 0:
        noise_std = config.router_noise_std / (config.num_experts // members)
        layer_losses = [
            load_loss(clean, noisy, noise_std, config.num_experts_per_tok)
            for clean, noisy in zip(router_logits, noisy_router_logits, strict=True)
        ]
        losses["load_loss"] = torch.stack(layer_losses).mean()
        aux_loss = aux_loss + config.router_load_loss_coef * losses["load_loss"]
    # CODEPATH: models trained with GShard's loss in place of V-MoE's
    if config.router_gshard_loss_coef > 0:
        losses["gshard_loss"] = torch.stack([gshard_loss(noisy) for noisy in noisy_router_logits]).mean()
        aux_loss = aux_loss + config.router_gshard_loss_coef * losses["gshard_loss"]
    return {"aux_loss": aux_loss, **losses}
