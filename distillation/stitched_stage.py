"""One student stage between its stitches."""

from typing import Literal

import torch
from torch import nn

from m2mkd.distillation.sizes import num_special_tokens
from m2mkd.distillation.stage import Stage
from m2mkd.modeling.stitches import StitchLayer


StitchType = Literal["layernorm_linear", "linear", "none"]


class StitchedStage(nn.Module):
    """
    `post_i ∘ S_i ∘ pre_i`: one student stage that takes and returns hidden states of the meta model's width. The first
    stage has no `pre`, the last one no `post` (it takes images, or returns logits).

    Args:
        stage (`Stage`): View on the student's layers.
        stitch_size (`int`): Width of the meta model.
        stitch (`str`): `"layernorm_linear"` (in the paper for V-MoE), `"linear"` (in the paper for NAC), or `"none"`
            if student and meta model have the same width (the incubation of a teacher).
        special_tokens (`int`, *optional*): Number of the meta model's tokens before the patches. `None`: as many as
            the student has. A DeiT has two, its class token and its distillation token. If the other network has only
            one, the DeiT gets a copy of the class token as the second (on digits, this is better than zeros or the
            mean of the patches if its second head reads that token), and the other network does not get the second.
            Where one network has none (a V-MoE whose head reads the mean of the patches), the other gets that mean as
            its class token.
        is_chained (`bool`): Whether the stage takes hidden states of the student itself, so that it needs no `pre`.
    """

    def __init__(
        self,
        stage: Stage,
        stitch_size: int,
        stitch: StitchType = "layernorm_linear",
        special_tokens: int | None = None,
        is_chained: bool = False,
    ):
        super().__init__()
        self.stage = stage
        width, normalize = stage.config.hidden_size, stitch == "layernorm_linear"
        self._takes_own_states = stage.is_first or is_chained
        has_pre, has_post = stitch != "none" and not self._takes_own_states, stitch != "none" and not stage.is_last
        self.pre = StitchLayer(stitch_size, width, normalize) if has_pre else nn.Identity()
        self.post = StitchLayer(width, stitch_size, normalize) if has_post else nn.Identity()
        own = num_special_tokens(stage.config)
        self._special_tokens = own, own if special_tokens is None else special_tokens

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers."""
        return self.stage.is_stochastic

    def stitch_state_dict(self) -> dict[str, torch.Tensor]:
        """Weights of only the stitches, as `pre.*` and `post.*`."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("stage.")}

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the first stage, else of shape
                `(batch_size, num_tokens, stitch_size)`.

        Returns:
            Hidden states of shape `(batch_size, num_tokens, stitch_size)` (logits for the last stage), and the
            auxiliary losses of the stage by name, in training.
        """
        own, losses = self.run(hidden_states)
        return self.stitched(own), losses

    def run(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`S_i ∘ pre_i`: hidden states of the student's width, and the auxiliary losses."""
        if not self._takes_own_states:
            hidden_states = self.with_own_tokens(hidden_states)
        if not self.training:
            return self._run(self.pre(hidden_states)), {}
        with self.stage.auxiliary_losses() as losses:
            hidden_states = self._run(self.pre(hidden_states))
        return hidden_states, losses()

    @property
    def has_post(self) -> bool:
        """Whether a stitch follows the stage."""
        return isinstance(self.post, StitchLayer)

    def with_own_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states of the other network with as many special tokens as the student has."""
        own, theirs = self._special_tokens
        return _with_special_tokens(hidden_states, theirs, own)

    def stitched(self, own_states: torch.Tensor) -> torch.Tensor:
        """`post_i`: the other network's width and tokens; logits stay as they are."""
        own, theirs = self._special_tokens
        states = self.post(own_states)
        return states if self.stage.is_last else _with_special_tokens(states, own, theirs)

    def _run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.stage(hidden_states)


def _with_special_tokens(hidden_states: torch.Tensor, given: int, wanted: int) -> torch.Tensor:
    """
    Change the number of tokens before the patches from `given` to `wanted`: leave out the last ones, or add copies of
    the class token, which is the first. Without one, add copies of the mean of the patches.
    """
    if given == wanted:
        return hidden_states
    first = hidden_states[:, :1] if given else hidden_states.mean(dim=1, keepdim=True)
    copies = first.expand(-1, max(wanted - given, 0), -1)
    return torch.cat([hidden_states[:, : min(given, wanted)], copies, hidden_states[:, given:]], dim=1)
