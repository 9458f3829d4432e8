"""A Neural Attentive Circuit as a chain of stages: read-in, rounds of messages, read-out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.distillation.stage import Stage
from m2mkd.errors import StageError


class NACStage(Stage):
    """
    Consecutive parts of a circuit, which has `num_hidden_layers + 2` of them: the read-in (0, with the image tokenizer
    and all latents), the rounds of messages, and the read-out (the last, with the classifier).

    Stages exchange the states of input and mediator latents, of shape
    `(batch_size, num_input_latents + num_mediator_latents, hidden_size)`.
    """

    takes_any_tokens = True
    has_graph = True
    is_meta_source = False
    few_shot_head = "sgd"

    def __init__(self, model: PreTrainedModel, index: int, num_stages: int, layer_indices: range):
        super().__init__(model, index, num_stages, layer_indices)
        # a tuple keeps the parts of other stages out of this one's parameters
        self._model = (model,)
        for path in self._paths():
            self._attach(model, path)

    @classmethod
    def count_layers(cls, model: PreTrainedModel) -> int:
        """Count the read-in, the rounds of messages and the read-out."""
        return model.config.num_hidden_layers + 2

    @classmethod
    def split(cls, model: PreTrainedModel, depths: Sequence[int]) -> list[Stage]:
        """
        Split a circuit into all its stages. Raises `StageError` if two of them would have the same propagator's
        weights.
        """
        stages = super().split(model, depths)
        if model.config.share_propagators and sum(len(stage.rounds) > 0 for stage in stages) > 1:
            raise StageError(
                f"With `share_propagators`, all rounds of messages have the same weights, but the depths "
                f"{list(depths)} put them into several stages. Put all rounds into one stage."
            )
        return stages

    @classmethod
    def leave_out_uncountable(cls, config: PreTrainedConfig) -> None:
        """Switch off the block model loss: it orders the latents by values that the meta device does not have."""
        config.block_model_coef = 0.0

    @property
    def is_shared(self) -> bool:
        """Whether other stages read parts of this one: the first stage has the latents of all."""
        return self.is_first

    @property
    def rounds(self) -> range:
        """Indices of the rounds of messages in this stage, from 0."""
        start, stop = self.layer_indices.start - 1, self.layer_indices.stop - 1
        return range(max(start, 0), min(stop, self.config.num_hidden_layers))

    def _module_paths(self) -> list[str]:
        """Paths of the modules in the paper's students: all except latents and kernels."""
        paths = ["nac.tokenizer", "nac.read_in"] if self.is_first else []
        rounds = {0} if self.config.share_propagators and self.rounds else self.rounds
        paths += [f"nac.layers.{layer}.{part}" for layer in rounds for part in ("attention", "ffn")]
        if self.is_last:
            paths += ["nac.read_out.attention", "nac.read_out.ffn"]
            heads = ("latent_head", "pooling", "classifier")
            paths += [name for name in heads if getattr(self._model[0], name) is not None]
        return paths

    def _paths(self) -> list[str]:
        paths = self._module_paths()
        if self.is_first:
            paths += ["nac.input_latents", "nac.mediator_latents", "nac.output_latents"]
            paths += ["nac.latent_seeder"] if self.config.use_latent_seeder else []
        rounds = {0} if self.config.share_propagators and self.rounds else self.rounds
        paths += [f"nac.layers.{layer}.kernel" for layer in rounds]
        return paths + (["nac.read_out.kernel"] if self.is_last else [])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the first stage, states of the latents for the others.
            kwargs: Passed to the circuit.
        """
        model = self._model[0]
        if self.num_stages == 1:
            return model.classify(model.nac(hidden_states, **kwargs).last_hidden_state)
        circuit = model.nac
        affinities = circuit.log_affinities()
        if self.is_first:
            inputs, mediators, _ = circuit.seed(hidden_states.shape[0])
            hidden_states = circuit.read(hidden_states, inputs, mediators)
        for layer in self.rounds:
            hidden_states = circuit.propagate(hidden_states, layer, affinities[layer], **kwargs)
        if self.is_last:
            *_, outputs = circuit.seed(hidden_states.shape[0])
            hidden_states = model.classify(circuit.write(hidden_states, outputs, affinities[-1], **kwargs))
        return hidden_states

    @contextmanager
    def auxiliary_losses(self) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        """The losses of the graph, if this stage is the whole circuit."""
        yield self._model[0].graph_losses if self.num_stages == 1 else dict

    def distilled(self) -> Stage:
        """The part of the stage that distillation trains; for a whole circuit, the stage itself."""
        if self.num_stages == 1:
            return self
        return NACDistilledStage(self._model[0], self.index, self.num_stages, self.layer_indices)

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers: codes, edges and pooling do."""
        return True


class NACDistilledStage(NACStage):
    """
    A stage in the form that m2mKD distils (section 3.2 of the paper): between layers of the meta model there are no
    latents, so all tokens of the meta model send and receive, without a graph. The stage has no latents and kernels.

    In addition to the hidden states, `forward` takes the codes and initial states that the latents would have given.
    """

    def _paths(self) -> list[str]:
        return self._module_paths()

    def forward(
        self,
        hidden_states: torch.Tensor,
        latent_states: torch.Tensor | None,
        latent_codes: torch.Tensor | None,
        token_codes: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the read-in, else `(batch_size, num_tokens, hidden_size)`.
            latent_states (`torch.Tensor` of shape `(batch_size, num_latents, hidden_size)`): Initial states of the
                latents that read the image, or that read out; `None` if the stage has only rounds.
            latent_codes (`torch.Tensor` of shape `(num_latents, code_size)`): Their codes.
            token_codes (`Sequence[torch.Tensor]`): Codes of the tokens in each round of the stage, and last in the
                read-out, of shape `(1 or num_tokens, code_size)`.

        Returns:
            `(batch_size, num_latents, hidden_size)` from the read-in, `(batch_size, num_tokens, hidden_size)` from
            rounds, logits from the read-out.
        """
        model = self._model[0]
        circuit = model.nac
        if self.is_first:
            part = circuit.read_in
            # no code noise, as in the official students
            states = part.attention(latent_states, circuit.tokenizer(hidden_states), latent_codes)
            hidden_states = part.ffn(states, latent_codes)
        for layer, codes in zip(self.rounds, () if token_codes is None else token_codes, strict=False):
            part = circuit.propagator(layer)
            hidden_states, _ = part.attention(hidden_states, hidden_states, codes, codes)
            hidden_states = part.ffn(hidden_states, codes)
        if self.is_last:
            part = circuit.read_out
            states, _ = part.attention(latent_states, hidden_states, latent_codes, token_codes[-1])
            hidden_states = model.classify(part.ffn(states, latent_codes), latent_codes)
        return hidden_states
