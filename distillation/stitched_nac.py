"""A stitched stage of a NAC: between layers of the meta model, fixed latents replace its own."""

from typing import Literal

import torch
from torch import nn

from m2mkd.distillation.nac_stages import NACStage
from m2mkd.distillation.stitched_stage import StitchedStage, StitchType


NACCodes = Literal["random", "own"]
ReadInLatents = Literal["one", "all"]


class StitchedNACStage(StitchedStage):
    """
    A distilled part of a NAC between its stitches, with the codes and initial states that it needs. They are buffers:
    drawn from the seed of the pair or taken from the student, equal on every process, the same for any batch size,
    fixed, and saved with the stitches. (The official code draws them again on every process, keeps one state per batch
    slot, and saves neither.)

    Args:
        stage (`NACStage`): View on the student.
        stitch_size (`int`): Width of the meta model.
        stitch (`str`): See [`StitchedStage`]; the paper uses `"linear"` for NAC.
        codes (`str`): `"random"` (as in the paper): one random code for all tokens and latents of the pair. `"own"`:
            the initial codes of the student's latents, which the end-to-end phase starts with; each token takes the
            code of one mediator, drawn again in every training step.
        read_in_latents (`str`): `"one"` (as in the paper): the read-in passes on one token. `"all"`: one for each of
            the student's input latents; the first stands for the meta model's class token.
        special_tokens (`int`, *optional*): Special tokens of the meta model, see [`StitchedStage`]; only the read-in
            uses it.
        is_chained (`bool`): See [`StitchedStage`].
    """

    def __init__(
        self,
        stage: NACStage,
        stitch_size: int,
        stitch: StitchType = "linear",
        codes: NACCodes = "random",
        read_in_latents: ReadInLatents = "one",
        special_tokens: int | None = None,
        is_chained: bool = False,
    ):
        tokens = special_tokens if stage.is_first else None
        super().__init__(stage.distilled(), stitch_size, stitch, tokens, is_chained)
        circuit = stage._model[0].nac
        latents = circuit.input_latents if stage.is_first else circuit.output_latents
        num_latents = 1
        if stage.is_first and read_in_latents == "all" or stage.is_last and codes == "own":
            num_latents = latents.num_latents
        if codes == "random":
            latent_codes = torch.randn(num_latents, stage.config.code_size)
            latent_states = torch.randn(1, num_latents, stage.config.hidden_size)
            token_codes = latent_codes[:1].expand(len(stage.rounds) + stage.is_last, -1, -1)
        else:
            latent_codes, latent_states, token_codes = _own(stage)
            latent_codes, latent_states = latent_codes[:num_latents], latent_states[:, :num_latents]
        has_latents = stage.is_first or stage.is_last
        self.latent_codes = nn.Buffer(latent_codes.clone()) if has_latents else None
        self.latent_states = nn.Buffer(latent_states.clone()) if has_latents else None
        self.token_codes = nn.Buffer(token_codes.clone()) if len(token_codes) else None

    def _run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = None
        if self.latent_states is not None:
            states = self.latent_states.expand(hidden_states.shape[0], -1, -1)
        return self.stage(hidden_states, states, self.latent_codes, self._codes_of_tokens(hidden_states))

    def _codes_of_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Codes of shape `(num_rounds, 1 or num_tokens, code_size)`; `None` if the stage is only a read-in."""
        if self.token_codes is None:
            return None
        num_codes = self.token_codes.shape[1]
        if num_codes == 1:
            return self.token_codes
        num_tokens = self.latent_codes.shape[0] if self.stage.is_first else hidden_states.shape[1]
        device = self.token_codes.device
        order = torch.randperm(num_codes, device=device) if self.training else torch.arange(num_codes, device=device)
        return self.token_codes[:, order[torch.arange(num_tokens, device=device) % num_codes]]


@torch.no_grad()
def _own(stage: NACStage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and initial states of the student's latents, and its mediators' codes in each round of the stage."""
    circuit = stage._model[0].nac
    latents = circuit.input_latents if stage.is_first else circuit.output_latents
    was_training = circuit.training
    circuit.eval()
    inputs, _, outputs = circuit.seed(1)
    circuit.train(was_training)
    rounds = [*stage.rounds, *([-1] if stage.is_last else [])]
    codes = [circuit.mediator_latents.layer_codes(layer) for layer in rounds]
    empty = latents.codes.new_empty(0, 1, latents.codes.shape[-1])
    return latents.codes, inputs if stage.is_first else outputs, torch.stack(codes) if codes else empty
