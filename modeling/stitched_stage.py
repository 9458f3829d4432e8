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
"""One student stage between its stitches."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn

from m2mkd.modeling.modeling_vmoe import VMoEDropPath, VMoERouter, balance_losses, has_balance_loss
from m2mkd.modeling.stages import Stage, num_special_tokens
from m2mkd.modeling.stitches import StitchLayer


StitchType = Literal["layernorm_linear", "linear", "none"]


class StitchedStage(nn.Module):
    """
    `post_i ∘ S_i ∘ pre_i`: one student stage that takes and returns hidden states of the meta model's width. The first
    stage has no `pre`, the last one no `post` (it takes images, or returns logits).

    Args:
        stage (`Stage`): View on the student's layers.
        stitch_size (`int`): Width of the meta model.
        stitch (`str`): `"layernorm_linear"` (the paper's for V-MoE), `"linear"` (its for NAC), or `"none"` where
            student and meta model have one width (the incubation of a teacher).
        special_tokens (`int`, *optional*): Tokens of the meta model before those of the patches. `None`: as many as
            the student's. A DeiT has two, its class and its distillation token; where the other network has one, the
            DeiT is given a copy of the class token as the second (on digits that is better than zeros or the mean of
            the patches if its second head reads that token), and the other network is not given the second.
    """

    def __init__(
        self,
        stage: Stage,
        stitch_size: int,
        stitch: StitchType = "layernorm_linear",
        special_tokens: int | None = None,
    ):
        super().__init__()
        self.stage = stage
        width, normalize = stage.config.hidden_size, stitch == "layernorm_linear"
        has_pre, has_post = stitch != "none" and not stage.is_first, stitch != "none" and not stage.is_last
        self.pre = StitchLayer(stitch_size, width, normalize) if has_pre else nn.Identity()
        self.post = StitchLayer(width, stitch_size, normalize) if has_post else nn.Identity()
        own = num_special_tokens(stage.config)
        self._special_tokens = own, own if special_tokens is None else special_tokens

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers."""
        return self.stage.is_stochastic or any(
            (isinstance(module, nn.Dropout) and module.p > 0)
            or (isinstance(module, VMoEDropPath) and module.drop_prob > 0)
            or (isinstance(module, VMoERouter) and module.noise_std > 0)
            or getattr(module, "attention_dropout", 0) > 0
            for module in self.stage.modules()
        )

    def stitch_state_dict(self) -> dict[str, torch.Tensor]:
        """Weights of the stitches alone, as `pre.*` and `post.*`."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("stage.")}

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the first stage, else of shape
                `(batch_size, num_tokens, stitch_size)`.

        Returns:
            Hidden states of shape `(batch_size, num_tokens, stitch_size)` (logits for the last stage), and the balance
            losses of the stage's sparse layers by name, if its config weighs any.
        """
        balanced = has_balance_loss(self.stage.config) and self.training
        with _record_routers(self.stage) if balanced else nullcontext() as recorded:
            hidden_states = self._stitched(hidden_states)
        if not balanced or not recorded:
            return hidden_states, self.stage.auxiliary_losses() if self.training else {}
        clean, noisy, _, _ = zip(*recorded, strict=True)
        return hidden_states, balance_losses(clean, noisy, self.stage.config)

    def _stitched(self, hidden_states: torch.Tensor) -> torch.Tensor:
        own, theirs = self._special_tokens
        if not self.stage.is_first:
            hidden_states = _with_special_tokens(hidden_states, theirs, own)
        hidden_states = self.post(self._run(self.pre(hidden_states)))
        return hidden_states if self.stage.is_last else _with_special_tokens(hidden_states, own, theirs)

    def _run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.stage(hidden_states)


def _with_special_tokens(hidden_states: torch.Tensor, given: int, wanted: int) -> torch.Tensor:
    """
    Hidden states whose first `given` tokens are not patches, with `wanted` such tokens: the last ones are left out, or
    copies of the class token, which is the first, are added.
    """
    if given == wanted:
        return hidden_states
    copies = hidden_states[:, :1].expand(-1, max(wanted - given, 0), -1)
    return torch.cat([hidden_states[:, : min(given, wanted)], copies, hidden_states[:, given:]], dim=1)


@contextmanager
def _record_routers(stage: nn.Module) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    recorded: list[tuple[torch.Tensor, ...]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, outputs: recorded.append(outputs))
        for module in stage.modules()
        if isinstance(module, VMoERouter)
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


__all__ = ["StitchType", "StitchedStage"]
