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
"""Losses as pure functions of tensors. They return a scalar or one value per image."""

from typing import Literal

import torch
import torch.nn.functional as F


KLReduction = Literal["batchmean", "mean"]
DistillationType = Literal["soft", "hard"]


def per_sample_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    r"""
    Cross entropy of every image, in float32: `-sum_c y_c log softmax(z)_c`.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`)
        labels (`torch.Tensor`): Class indices of shape `(batch_size,)`, or target distributions (mixup, CutMix) of
            shape `(batch_size, num_labels)`.
        label_smoothing (`float`): Fraction of the target that is spread evenly over all classes.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def per_sample_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Divergence of the student from the teacher for every image, in float32:
    `temperature^2 * KL(softmax(z_T / temperature) || softmax(z_S / temperature))`.

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`)
        temperature (`float`): tau in the paper. The factor tau^2 preserves the magnitude of the gradient.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def soft_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    reduction: KLReduction = "batchmean",
) -> torch.Tensor:
    r"""
    The soft distillation term (m2mKD, equation 3).

    Args:
        student_logits, teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`)
        temperature (`float`): tau in the paper.
        reduction (`str`): `"batchmean"` averages over the images. `"mean"` averages over images times classes, as the
            official code does, which is `num_labels` times weaker: with 1,000 classes, distillation has almost no
            effect. Use it only to reproduce a published number.
    """
    loss = per_sample_kl(student_logits, teacher_logits, temperature).mean()
    return loss / student_logits.shape[-1] if reduction == "mean" else loss


def hard_distillation_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the teacher's most likely class; both of shape `(batch_size, num_labels)`."""
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


def boundary_loss(hidden_states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    Squared distance of hidden states from those of another network, in float32, relative to the variance of the
    latter: `mean((h - t)^2) / mean((t - mean(t))^2)`. `mean(t)` is taken for each channel over the batch and the
    tokens. The best constant has a loss of 1.

    Args:
        hidden_states, target (`torch.Tensor` of shape `(..., hidden_size)`): Two tensors of the same shape; `target`
            gets no gradient.
    """
    target = target.detach().float().flatten(end_dim=-2)
    error = (hidden_states.float().flatten(end_dim=-2) - target).pow(2).mean()
    return error / target.var(dim=0, correction=0).mean().clamp(min=torch.finfo(torch.float32).tiny)


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


__all__ = [
    "DistillationType",
    "KLReduction",
    "boundary_loss",
    "hard_distillation_loss",
    "importance_loss",
    "load_loss",
    "per_sample_cross_entropy",
    "per_sample_kl",
    "soft_distillation_loss",
]
