"""Stages of transformers: ViT, DeiT, DINOv2 and V-MoE classifiers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m2mkd.distillation.stage import Stage
from m2mkd.errors import StageError


@dataclass(frozen=True)
class _Architecture:
    """
    Module paths of a classifier's parts, and how its head reads the last hidden states; `None` for a head of which the
    stage's class knows how.
    """

    embeddings: str
    layers: str
    layernorm: str
    pool: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None
    classifiers: tuple[str, ...] = ("classifier",)


def _class_token(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    return (hidden_states[:, 0],)


def _class_and_distillation_token(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden_states[:, 0], hidden_states[:, 1]


def _class_token_and_patch_mean(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    if hidden_states.shape[1] == 1:
        raise StageError(
            "The head of a DINOv2 reads the class token and the mean of the patches, but it got only one token. If "
            "this is the read-in of a NAC, set `read_in_latents` to 'all' (in a recipe, in `distill.training`)."
        )
    return (torch.cat([hidden_states[:, 0], hidden_states[:, 1:].mean(dim=1)], dim=1),)


_ARCHITECTURES = {
    "ViTForImageClassification": _Architecture("vit.embeddings", "vit.layers", "vit.layernorm", _class_token),
    "DeiTForImageClassification": _Architecture("deit.embeddings", "deit.layers", "deit.layernorm", _class_token),
    # Each head reads its own token; the logits are the mean over the heads.
    "DeiTForImageClassificationWithTeacher": _Architecture(
        "deit.embeddings",
        "deit.layers",
        "deit.layernorm",
        _class_and_distillation_token,
        ("cls_classifier", "distillation_classifier"),
    ),
    "Dinov2ForImageClassification": _Architecture(
        "dinov2.embeddings", "dinov2.encoder.layer", "dinov2.layernorm", _class_token_and_patch_mean
    ),
    "VMoEForImageClassification": _Architecture("vmoe.embeddings", "vmoe.layers", "vmoe.layernorm", None),
}
TRANSFORMERS = tuple(_ARCHITECTURES)


class TransformerStage(Stage):
    """Consecutive transformer layers, with the embeddings in the first stage and the head in the last."""

    interpolates_positions = True

    def __init__(self, model: PreTrainedModel, index: int, num_stages: int, layer_indices: range):
        super().__init__(model, index, num_stages, layer_indices)
        architecture = _ARCHITECTURES[type(model).__name__]
        self._pool = architecture.pool
        # tuples, unlike plain attributes, do not register the modules a second time
        self._embeddings = tuple(self._attach(model, architecture.embeddings)) if self.is_first else ()
        self._layers = tuple(self._attach(model, *(f"{architecture.layers}.{i}" for i in layer_indices)))
        head = (architecture.layernorm, *architecture.classifiers) if self.is_last else ()
        self._head = tuple(self._attach(model, *head))

    @classmethod
    def count_layers(cls, model: PreTrainedModel) -> int:
        """Count the transformer layers of a model."""
        return len(model.get_submodule(_ARCHITECTURES[type(model).__name__].layers))

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The transformer layers, in order."""
        return self._layers

    @property
    def embeddings(self) -> nn.Module | None:
        """The model's embeddings, in the first stage."""
        return self._embeddings[0] if self._embeddings else None

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the first stage, hidden states for the others.
            kwargs: Passed to the embeddings, e.g. `interpolate_pos_encoding=True`; only the first stage takes any.
        """
        for embeddings in self._embeddings:
            images = hidden_states.to(next(embeddings.parameters()).dtype)
            hidden_states = embeddings(images, **kwargs)
        for layer in self._layers:
            hidden_states = layer(hidden_states)
        if self._head:
            layernorm, *classifiers = self._head
            pooled = self._pooled(layernorm(hidden_states))
            logits = [classifier(tokens) for classifier, tokens in zip(classifiers, pooled, strict=True)]
            hidden_states = logits[0] if len(logits) == 1 else sum(logits) / len(logits)
        return hidden_states

    def _pooled(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._pool(hidden_states)
