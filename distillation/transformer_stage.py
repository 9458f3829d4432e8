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

    For a V-MoE made from the classifier: a layer's names that differ from a V-MoE's, the projection before each
    LayerScale, what of the tokens and of the head a V-MoE cannot express, and the tensors that are left out.
    """

    embeddings: str
    layers: str
    layernorm: str
    pool: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None
    classifiers: tuple[str, ...] = ("classifier",)
    layer_names: tuple[tuple[str, str], ...] = ()
    layer_scales: tuple[tuple[str, str], ...] = ()
    lost_tokens: str | None = None
    lost_head: str | None = None
    left_out: tuple[str, ...] = ()


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
    "DeiTForImageClassification": _Architecture(
        "deit.embeddings",
        "deit.layers",
        "deit.layernorm",
        _class_token,
        lost_tokens="the distillation token",
        left_out=("deit.embeddings.distillation_token",),
    ),
    # Each head reads its own token; the logits are the mean over the heads.
    "DeiTForImageClassificationWithTeacher": _Architecture(
        "deit.embeddings",
        "deit.layers",
        "deit.layernorm",
        _class_and_distillation_token,
        ("cls_classifier", "distillation_classifier"),
        lost_tokens="the distillation token",
        lost_head="the head of the distillation token",
        left_out=("deit.embeddings.distillation_token", "distillation_classifier"),
    ),
    "Dinov2ForImageClassification": _Architecture(
        "dinov2.embeddings",
        "dinov2.encoder.layer",
        "dinov2.layernorm",
        _class_token_and_patch_mean,
        layer_names=((".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after.")),
        layer_scales=(("attention.o_proj", "layer_scale1.lambda1"), ("mlp.fc2", "layer_scale2.lambda1")),
        lost_head="the half of the head that reads the mean of the patches",
        # only masked image modeling reads it
        left_out=("dinov2.embeddings.mask_token",),
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
        self._architecture = architecture
        # tuples, unlike plain attributes, do not register the modules a second time
        self._embeddings = tuple(self._attach(model, architecture.embeddings)) if self.is_first else ()
        self._layers = tuple(self._attach(model, *(f"{architecture.layers}.{i}" for i in layer_indices)))
        head = (architecture.layernorm, *architecture.classifiers) if self.is_last else ()
        self._head = tuple(self._attach(model, *head))

    @classmethod
    def classifiers_of(cls, model: PreTrainedModel) -> list[nn.Module]:
        """The heads of a model: a distilled DeiT has two."""
        return [model.get_submodule(name) for name in _ARCHITECTURES[type(model).__name__].classifiers]

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

    def lost_in_vmoe(self, with_head: bool) -> list[str]:
        """What [`vmoe_weights`] leaves out although the logits depend on it (without the head: the hidden states)."""
        lost = (self._architecture.lost_tokens, self._architecture.lost_head if with_head else None)
        return [what for what in lost if what is not None]

    def vmoe_weights(self) -> dict[str, torch.Tensor]:
        """
        The stage's tensors under the names that `VMoEForImageClassification` has for them. Each LayerScale is
        multiplied into the projection before it. Of the special tokens and of the head, only the class token's are in.
        """
        ours = self._architecture
        parts = {
            ours.embeddings: "vmoe.embeddings",
            ours.layers: "vmoe.layers",
            ours.layernorm: "vmoe.layernorm",
            ours.classifiers[0]: "classifier",
        }
        given = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(ours.left_out)}
        for index in self.layer_indices:
            for projection, layer_scale in ours.layer_scales:
                scale = given.pop(f"{ours.layers}.{index}.{layer_scale}")
                for name, shape in (("weight", (-1, 1)), ("bias", (-1,))):
                    path = f"{ours.layers}.{index}.{projection}.{name}"
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
        for embeddings in self._embeddings:
            name, patches = "vmoe.embeddings.position_embeddings", embeddings.patch_embeddings.num_patches
            weights[name] = torch.cat([weights[name][:, :1], weights[name][:, -patches:]], dim=1)
        return weights

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
        return self._architecture.pool(hidden_states)
