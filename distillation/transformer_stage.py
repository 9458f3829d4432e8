"""Stages of the transformers that `architectures.py` declares."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m2mkd.distillation.architectures import ARCHITECTURES
from m2mkd.distillation.stage import Stage


class TransformerStage(Stage):
    """Consecutive transformer layers, with the embeddings in the first stage and the head in the last."""

    interpolates_positions = True

    def __init__(self, model: PreTrainedModel, index: int, num_stages: int, layer_indices: range):
        super().__init__(model, index, num_stages, layer_indices)
        architecture = ARCHITECTURES[type(model).__name__]
        self._architecture = architecture
        # tuples, unlike plain attributes, do not register the modules a second time
        self._embeddings = tuple(self._attach(model, *architecture.embeddings)) if self.is_first else ()
        self._layers = tuple(self._attach(model, *(f"{architecture.layers}.{i}" for i in layer_indices)))
        self._norms = tuple(self._attach(model, *architecture.norms)) if self.is_last else ()
        self._classifiers = tuple(self._attach(model, *architecture.classifiers)) if self.is_last else ()
        present = {name for name, _ in model.named_modules()}
        further = (*architecture.everywhere, *(architecture.unused if self.is_last else ()))
        self._attach(model, *(path for path in further if path in present))

    @classmethod
    def classifiers_of(cls, model: PreTrainedModel) -> list[nn.Module]:
        """The heads of a model: a distilled DeiT has two."""
        return [model.get_submodule(name) for name in ARCHITECTURES[type(model).__name__].classifiers]

    @classmethod
    def count_layers(cls, model: PreTrainedModel) -> int:
        """Count the transformer layers of a model."""
        return len(model.get_submodule(ARCHITECTURES[type(model).__name__].layers))

    @classmethod
    def resize(cls, model: PreTrainedModel, image_size: int) -> None:
        """Adapt a model in place to square images of another size."""
        ARCHITECTURES[type(model).__name__].resize(model, image_size)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The transformer layers, in order."""
        return self._layers

    @property
    def embeddings(self) -> nn.Module | None:
        """The model's embeddings, in the first stage."""
        return self._embeddings[0] if self._embeddings else None

    def lost_in_vmoe(self, with_head: bool) -> list[str]:
        """What [`vmoe_weights`] leaves out although the logits depend on it (without the head: the hidden states)."""
        ours = self._architecture.to_vmoe
        lost = (ours.lost_tokens, ours.lost_head if with_head else None)
        return [what for what in lost if what is not None]

    def vmoe_weights(self) -> dict[str, torch.Tensor]:
        """
        The stage's tensors under the names that `VMoEForImageClassification` has for them. Each LayerScale is
        multiplied into the projection before it. Of the special tokens and of the head, only the class token's are in.
        Raises `StageError` for an architecture that a V-MoE cannot express.
        """
        paths, ours = self._architecture, self._architecture.to_vmoe
        if ours is None:
            return super().vmoe_weights()
        parts = {
            paths.embeddings[0]: "vmoe.embeddings",
            paths.layers: "vmoe.layers",
            paths.norms[0]: "vmoe.layernorm",
            paths.classifiers[0]: "classifier",
        }
        given = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(ours.left_out)}
        for index in self.layer_indices:
            for projection, layer_scale in ours.layer_scales:
                scale = given.pop(f"{paths.layers}.{index}.{layer_scale}")
                for name, shape in (("weight", (-1, 1)), ("bias", (-1,))):
                    path = f"{paths.layers}.{index}.{projection}.{name}"
                    if path in given:  # a gated MLP has other projections
                        given[path] = given[path] * scale.view(shape)
        weights = {}
        for name, tensor in given.items():
            part = next(part for part in parts if name.startswith(f"{part}."))
            name = f"{parts[part]}{name.removeprefix(part)}"
            for theirs, own in ours.layer_names:
                name = name.replace(theirs, own)
            weights[name] = tensor
        for name in {"classifier.weight"} & weights.keys():
            weights[name] = weights[name][:, : self.config.hidden_size]
        for embeddings in self._embeddings[:1]:
            name, patches = "vmoe.embeddings.position_embeddings", embeddings.patch_embeddings.num_patches
            weights[name] = torch.cat([weights[name][:, :1], weights[name][:, -patches:]], dim=1)
        return weights

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the first stage, hidden states for the others.
            kwargs: Passed to the embeddings, e.g. `interpolate_pos_encoding=True`; only the first stage takes any.
        """
        if self.is_first:
            hidden_states = self._embedded(hidden_states, **kwargs)
        arguments = self._architecture.layer_arguments(self, hidden_states)
        for layer in self._layers:
            hidden_states = layer(hidden_states, **arguments)
        if self.is_last:
            for norm in self._norms:
                hidden_states = norm(hidden_states)
            pooled = self._pooled(hidden_states)
            logits = [classifier(tokens) for classifier, tokens in zip(self._classifiers, pooled, strict=True)]
            hidden_states = logits[0] if len(logits) == 1 else sum(logits) / len(logits)
        return hidden_states

    def _embedded(self, images: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        embeddings, *further = self._embeddings
        hidden_states = embeddings(images.to(next(embeddings.parameters()).dtype), **kwargs)
        for module in further:
            hidden_states = module(hidden_states)
        return hidden_states

    def _pooled(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._architecture.pool(hidden_states)
