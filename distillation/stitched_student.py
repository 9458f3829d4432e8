"""The trainable half of m2mKD: student stages between stitches. The frozen half is in `frozen_networks.py`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from m2mkd.distillation.nac_stages import NACStage
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.stitched_nac import NACCodes, ReadInLatents, StitchedNACStage
from m2mkd.distillation.stitched_stage import StitchedStage, StitchType


Feed = Literal["teacher", "student"]


class StitchedStudent(nn.Module):
    """
    The stitched stages that one process trains, by pair index. Its optimizer, checkpoints and gradient buckets contain
    nothing else.

    Args:
        student (`PreTrainedModel`): The model that the stages belong to.
        stages (`Sequence[Stage]`): The stages to train.
        stitch_size (`int`): Width of the meta model.
        stitch (`str`, *optional*): See [`StitchedStage`]. `None`: the paper's choice for this student, `"linear"` for
            a NAC and `"layernorm_linear"` for the others.
        seed (`int`): Seed of the stitches' weights, and of the replacement for a NAC's latents.
        nac_codes (`str`), read_in_latents (`str`): See [`StitchedNACStage`]; other students do not read them.
        special_tokens (`int`, *optional*): Special tokens of the meta model, see [`StitchedStage`].
        feed (`str`): Input of a stage: `"teacher"`, what it is given, or `"student"`, the output of the stage before
            it, without gradient, so that the stages are one chain and need no `pre`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        stages: Sequence[Stage],
        stitch_size: int,
        stitch: StitchType | None = None,
        seed: int = 0,
        nac_codes: NACCodes = "random",
        read_in_latents: ReadInLatents = "one",
        special_tokens: int | None = None,
        feed: Feed = "teacher",
    ):
        super().__init__()
        self.config = student.config
        self.is_chained = feed == "student"
        self.pairs = nn.ModuleDict()
        for stage in stages:
            with torch.random.fork_rng(devices=[]):
                # each pair has its own stream: its stitches start the same whether it is trained alone or with others
                torch.manual_seed(seed * 1000 + 500 + stage.index)
                if isinstance(stage, NACStage) and stage.num_stages > 1:
                    own = (nac_codes, read_in_latents)
                    pair = StitchedNACStage(
                        stage, stitch_size, stitch or "linear", *own, special_tokens, self.is_chained
                    )
                else:
                    kind = stitch or "layernorm_linear"
                    pair = StitchedStage(stage, stitch_size, kind, special_tokens, self.is_chained)
                self.pairs[str(stage.index)] = pair
        # FSDP shards these one by one; a process may have only some of them
        kinds = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(kinds.intersection(student._no_split_modules))
        # a tuple keeps the student out of this module's parameters: other stages are not trained here
        self._student = (student,)

    def forward(
        self, hidden_states: Mapping[int, torch.Tensor], seed: int | None = None
    ) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """
        Args:
            hidden_states (`dict[int, torch.Tensor]`): Input of each pair, by index; of a chain, only that of the first
                pair is read.
            seed (`int`, *optional*): Draw each pair's random numbers (dropout, drop path, router noise) from this
                seed and its index, so that a pair sees the same ones whether it is trained alone or with others.

        Returns:
            What each pair returns, by its name in `pairs`: DeepSpeed refuses keys that are numbers.
        """
        return {
            str(index): (self.pairs[str(index)].stitched(states), losses)
            for index, (states, losses) in self.run(hidden_states, seed).items()
        }

    def run(
        self, hidden_states: Mapping[int, torch.Tensor], seed: int | None = None
    ) -> dict[int, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """What [`forward`] returns, by index and before the stitches behind the stages."""
        outputs, inputs = {}, None
        for name, pair in self.pairs.items():
            index = int(name)
            if inputs is None or not self.is_chained:
                inputs = hidden_states[index]
            with _own_random_stream(seed, index, inputs.device) if seed is not None else nullcontext():
                outputs[index] = pair.run(inputs)
            inputs = outputs[index][0].detach()
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

    # Names used before transformers 5.23, which calls the ones above if they exist.
    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the student's layers in the backward pass instead of keeping their activations."""
        self._student[0].gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._student[0].gradient_checkpointing_disable()


@contextmanager
def _own_random_stream(seed: int, index: int, device: torch.device) -> Iterator[None]:
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed((seed * 1000 + index) % 2**63)
        yield
