"""Losses as pure functions of tensors. They return a scalar or one value per image."""

from typing import Literal

import torch
import torch.nn.functional as F


KLReduction = Literal["batchmean", "mean"]


def per_sample_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    r"""
    Cross entropy per image, in float32: `-sum_c y_c log softmax(z)_c`.

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
    Divergence of the student from the teacher per image, in float32:
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


def per_sample_boundary_error(hidden_states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[`boundary_loss`] of each image of the batch, of shape `(batch_size,)`; its mean is that loss."""
    target = target.detach().float()
    variance = target.flatten(end_dim=-2).var(dim=0, correction=0).mean()
    errors = (hidden_states.float() - target).pow(2).flatten(start_dim=1).mean(dim=1)
    return errors / variance.clamp(min=torch.finfo(torch.float32).tiny)


def boundary_loss(hidden_states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    Squared distance of hidden states from those of another network, in float32, relative to the variance of the
    latter: `mean((h - t)^2) / mean((t - mean(t))^2)`. `mean(t)` is taken per channel over the batch and the
    tokens. The best constant prediction has a loss of 1.

    Args:
        hidden_states, target (`torch.Tensor` of shape `(..., hidden_size)`): Two tensors of the same shape; `target`
            gets no gradient.
    """
    target = target.detach().float().flatten(end_dim=-2)
    error = (hidden_states.float().flatten(end_dim=-2) - target).pow(2).mean()
    return error / target.var(dim=0, correction=0).mean().clamp(min=torch.finfo(torch.float32).tiny)


def pool_tokens(hidden_states: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Reduce hidden states to `num_tokens` tokens, as the target of a module that returns fewer (the read-in of a NAC):
    the first is the class token, the others are means of consecutive patches.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, tokens, hidden_size)`): The class token, then the patches.
        num_tokens (`int`)
    """
    if hidden_states.shape[1] == num_tokens:
        return hidden_states
    if num_tokens == 1:
        return hidden_states[:, :1]
    patches = F.adaptive_avg_pool1d(hidden_states[:, 1:].transpose(1, 2), num_tokens - 1).transpose(1, 2)
    return torch.cat([hidden_states[:, :1], patches], dim=1)
