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
"""The trainable half of m2mKD: student stages between stitches. What stays frozen is in `frozen_networks.py`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from m2mkd.modeling.modeling_vmoe import VMoEDropPath, VMoERouter, balance_losses, has_balance_loss
from m2mkd.modeling.stages import Stage
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
    """

    def __init__(self, stage: Stage, stitch_size: int, stitch: StitchType = "layernorm_linear"):
        super().__init__()
        self.stage = stage
        width, normalize = stage.config.hidden_size, stitch == "layernorm_linear"
        has_pre, has_post = stitch != "none" and not stage.is_first, stitch != "none" and not stage.is_last
        self.pre = StitchLayer(stitch_size, width, normalize) if has_pre else nn.Identity()
        self.post = StitchLayer(width, stitch_size, normalize) if has_post else nn.Identity()

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers."""
        return any(
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
            hidden_states = self.post(self.stage(self.pre(hidden_states)))
        if not balanced or not recorded:
            return hidden_states, {}
        clean, noisy, _, _ = zip(*recorded, strict=True)
        return hidden_states, balance_losses(clean, noisy, self.stage.config)


class StitchedStudent(nn.Module):
    """
    The stitched stages that one process trains, by pair index: all that its optimizer, its checkpoints and its
    gradient buckets hold.

    Args:
        student (`PreTrainedModel`): Whose stages these are.
        stages (`Sequence[Stage]`): The stages to train.
        stitch_size (`int`): Width of the meta model.
        stitch (`str`): See [`StitchedStage`].
        seed (`int`): Seed of the stitches' weights.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        stages: Sequence[Stage],
        stitch_size: int,
        stitch: StitchType = "layernorm_linear",
        seed: int = 0,
    ):
        super().__init__()
        self.config = student.config
        self.pairs = nn.ModuleDict()
        for stage in stages:
            with torch.random.fork_rng(devices=[]):
                # a stream of its own: a pair's stitches start the same whether it is trained alone or with others
                torch.manual_seed(seed * 1000 + 500 + stage.index)
                self.pairs[str(stage.index)] = StitchedStage(stage, stitch_size, stitch)
        # a tuple keeps the student out of this module's parameters: other stages are not trained here
        self._student = (student,)

    def forward(
        self, hidden_states: Mapping[int, torch.Tensor], seed: int | None = None
    ) -> dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """
        Args:
            hidden_states (`dict[int, torch.Tensor]`): Input of each pair, by index.
            seed (`int`, *optional*): Draw each pair's random numbers (dropout, drop path, router noise) from this
                seed and its index, so that a pair sees the same ones whether it is trained alone or with others.
        """
        outputs = {}
        for name, pair in self.pairs.items():
            index = int(name)
            inputs = hidden_states[index]
            with _own_random_stream(seed, index, inputs.device) if seed is not None else nullcontext():
                outputs[index] = pair(inputs)
        return outputs

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers."""
        return any(pair.is_stochastic for pair in self.pairs.values())

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the student's layers in the backward pass instead of keeping their activations."""
        self._student[0].activation_checkpointing_enable(**kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._student[0].activation_checkpointing_disable()

    # The names before transformers 5.23; it calls the ones above where they exist.
    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the student's layers in the backward pass instead of keeping their activations."""
        self._student[0].gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._student[0].gradient_checkpointing_disable()


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


@contextmanager
def _own_random_stream(seed: int, index: int, device: torch.device) -> Iterator[None]:
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed((seed * 1000 + index) % 2**63)
        yield


__all__ = ["StitchType", "StitchedStage", "StitchedStudent"]
