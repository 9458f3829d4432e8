"""The frozen half of m2mKD: the networks around each pair, and what the pair has to match."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from m2mkd.distillation.stage import Stage


Match = Literal["logits", "boundary"]
Tensors = dict[int, torch.Tensor]


class FrozenNetworks(nn.Module):
    """
    Meta model and teacher stages, without gradients of their own and always in evaluation mode.

    Args:
        meta_stages (`Sequence[Stage]`): All stages of the meta model; empty where one pair is the whole student
            (ordinary distillation, or none).
        teacher_stages (`Mapping[int, Stage]`): The teacher stages of the pairs that this process trains, by index;
            empty to train without a teacher.
        match (`str`): What the output of a pair is compared with: `"logits"` (of the meta model with the teacher's
            stage in it, as in the paper), or `"boundary"` (the output of the teacher's stage).
    """

    def __init__(self, meta_stages: Sequence[Stage], teacher_stages: Mapping[int, Stage], match: Match = "logits"):
        super().__init__()
        self.meta = nn.ModuleList(meta_stages)
        self.teacher = nn.ModuleDict({str(index): stage for index, stage in teacher_stages.items()})
        self.match = match
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all of it computes in."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def train(self, mode: bool = True) -> "FrozenNetworks":
        """Stay in evaluation mode whatever `mode` is: dropout in a teacher is noise in the target."""
        return super().train(False)

    def names(self, indices: Sequence[int]) -> list[str]:
        """What a batch must have for some pairs, apart from labels."""
        return ["pixel_values"]

    @torch.no_grad()
    def prefix(self, pixel_values: torch.Tensor, indices: Sequence[int]) -> Tensors:
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

    def matched(self, hidden_states: torch.Tensor, index: int) -> torch.Tensor:
        """Turn the output of pair `index`, or of the teacher's stage, into what is compared: logits, or itself."""
        return self.suffix(hidden_states, index) if self.match == "logits" else hidden_states

    @torch.no_grad()
    def boundaries(self, batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> tuple[Tensors, Tensors]:
        """
        Compute the inputs `h_i` of the pairs, and for every pair with a teacher the output `T_i (h_i)` of its stage,
        of shape `(batch_size, num_tokens, hidden_size)`, for the last pair `(batch_size, num_labels)`. The arguments
        are those of [`inputs_and_targets`].
        """
        inputs = self.prefix(batch["pixel_values"], indices)
        return inputs, {
            index: self.teacher[str(index)](hidden_states)
            for index, hidden_states in inputs.items()
            if str(index) in self.teacher
        }

    @torch.no_grad()
    def inputs_and_targets(self, batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> tuple[Tensors, Tensors]:
        """
        Compute the inputs `h_i` of the pairs, and for every pair with a teacher its target: the logits
        `z_T = M_N ∘ … ∘ M_{i+1} ∘ T_i (h_i)`, of shape `(batch_size, num_labels)`, or the teacher's `T_i (h_i)`.

        Args:
            batch (`dict[str, torch.Tensor]`): Its `pixel_values` are of shape `(batch_size, num_channels, height,
                width)`.
            indices (`Sequence[int]`): Pair indices, from 0.
        """
        inputs, outputs = self.boundaries(batch, indices)
        return inputs, {index: self.matched(states, index) for index, states in outputs.items()}


class TeacherContext(FrozenNetworks):
    """
    The teacher in the role of the meta model: the inputs of the pairs and their targets are its own hidden states, all
    from one pass.

    Args:
        teacher_stages (`Sequence[Stage]`): All stages of the teacher.
        indices (`Sequence[int]`): The pairs that this process trains. Stages behind them are kept only if the logits
            are matched.
        match (`str`): See [`FrozenNetworks`]; the logits are the teacher's own.
    """

    def __init__(self, teacher_stages: Sequence[Stage], indices: Sequence[int], match: Match = "boundary"):
        kept = len(teacher_stages) if match == "logits" else max(indices) + 1
        super().__init__(teacher_stages[:kept], {}, match)

    @torch.no_grad()
    def boundaries(self, batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> tuple[Tensors, Tensors]:
        """Compute the hidden states before and after the teacher's stages, in one pass."""
        inputs = self.prefix(batch["pixel_values"], range(max(indices) + 1))
        last = self.meta[max(indices)](inputs[max(indices)])
        outputs = [*list(inputs.values())[1:], last]
        return {index: inputs[index] for index in indices}, {index: outputs[index] for index in indices}

    @torch.no_grad()
    def inputs_and_targets(self, batch: Mapping[str, torch.Tensor], indices: Sequence[int]) -> tuple[Tensors, Tensors]:
        """Compute the teacher's hidden states before the pairs, and the targets; the logits are those of one pass."""
        inputs, outputs = self.boundaries(batch, indices)
        if self.match == "boundary":
            return inputs, outputs
        return inputs, dict.fromkeys(indices, self.suffix(outputs[max(indices)], max(indices)))
