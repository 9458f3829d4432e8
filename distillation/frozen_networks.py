"""The frozen half of m2mKD: the meta model around each pair, and the teacher's stages."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from m2mkd.distillation.stage import Stage


class FrozenNetworks(nn.Module):
    """
    Meta model and teacher stages, without gradients of their own and always in evaluation mode.

    Args:
        meta_stages (`Sequence[Stage]`): All stages of the meta model; empty where one pair is the whole student
            (ordinary distillation, or none).
        teacher_stages (`Mapping[int, Stage]`): The teacher stages of the pairs that this process trains, by index;
            empty to train without a teacher.
    """

    def __init__(self, meta_stages: Sequence[Stage], teacher_stages: Mapping[int, Stage]):
        super().__init__()
        self.meta = nn.ModuleList(meta_stages)
        self.teacher = nn.ModuleDict({str(index): stage for index, stage in teacher_stages.items()})
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all of it computes in."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def train(self, mode: bool = True) -> "FrozenNetworks":
        """Stay in evaluation mode whatever `mode` is: dropout in a teacher is noise in the target."""
        return super().train(False)

    @torch.no_grad()
    def prefix(self, pixel_values: torch.Tensor, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """
        Compute `h_i = M_{i-1} ∘ … ∘ M_1 (x)` for every pair, in one pass through the meta model.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`)
            indices (`Sequence[int]`): Pair indices, from 0. Pair 0 gets the images themselves.

        Returns:
            `dict[int, torch.Tensor]`: Input of each pair, by index.
        """
        hidden_states, inputs = pixel_values, {}
        for index in range(max(indices) + 1):
            if index in indices:
                inputs[index] = hidden_states
            if index < max(indices):
                hidden_states = self.meta[index](hidden_states)
        return inputs

    def suffix(self, hidden_states: torch.Tensor, index: int) -> torch.Tensor:
        """
        Apply `M_N ∘ … ∘ M_{i+1}`, which turns the output of pair `index` into logits. Gradient passes to its input
        only.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): Output of the pair; for
                the last pair, already the logits.
            index (`int`): Pair index, from 0.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_labels)`.
        """
        for stage in self.meta[index + 1 :]:
            # a student under autocast returns float32
            hidden_states = stage(hidden_states.to(self.dtype))
        return hidden_states

    @torch.no_grad()
    def teacher_logits(self, inputs: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """
        Compute `z_T = M_N ∘ … ∘ M_{i+1} ∘ T_i (h_i)`, of shape `(batch_size, num_labels)`, for every pair with a
        teacher.
        """
        return {
            index: self.suffix(self.teacher[str(index)](hidden_states), index)
            for index, hidden_states in inputs.items()
            if str(index) in self.teacher
        }
