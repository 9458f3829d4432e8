"""Stages of a timm ViT that transformers' `TimmWrapperForImageClassification` holds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.distillation.resize import resize_timm
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.whole_stage import WholeStage


_STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")


class TimmStage(Stage):
    """
    Consecutive blocks of timm's `VisionTransformer` (also its distilled DeiT). The first stage has everything before
    the blocks, the last one everything behind them, by timm's own methods. Another timm model is one stage.
    """

    interpolates_positions = True

    def __init__(self, model: PreTrainedModel, index: int, num_stages: int, layer_indices: range):
        super().__init__(model, index, num_stages, layer_indices)
        vit = model.timm_model
        # a tuple does not register it: the stage's own parts are registered below
        self._vit = (vit,)
        behind = [name for name, _ in vit.named_children() if name not in (*_STEM, "blocks")]
        if self.is_first:
            self._attach(model, *(f"timm_model.{name}" for name in _STEM))
        self._layers = tuple(self._attach(model, *(f"timm_model.blocks.{i}" for i in layer_indices)))
        if self.is_last:
            self._attach(model, *(f"timm_model.{name}" for name in behind))
        if self.is_first:
            # class token and positions belong to no module of their own
            for name, parameter in vit.named_parameters(recurse=False):
                self.timm_model.register_parameter(name, parameter)

    @classmethod
    def classifiers_of(cls, model: PreTrainedModel) -> list[nn.Module]:
        """The heads of a model: a distilled DeiT has two."""
        heads = model.timm_model.get_classifier()
        return list(heads) if isinstance(heads, tuple) else [heads]

    @classmethod
    def count_layers(cls, model: PreTrainedModel) -> int:
        """Count the blocks of a model; one that is no ViT counts as one."""
        return len(model.timm_model.blocks) if _is_vit(model) else 1

    @classmethod
    def can_be_cut(cls, model: PreTrainedModel) -> bool:
        """Whether it is a ViT."""
        return _is_vit(model)

    @classmethod
    def split(cls, model: PreTrainedModel, depths: Sequence[int]) -> list[Stage]:
        """Split a model into its stages; one that is no ViT is one stage."""
        return super().split(model, depths) if _is_vit(model) else WholeStage.split(model, depths)

    @classmethod
    def resize(cls, model: PreTrainedModel, image_size: int) -> None:
        """Adapt a ViT in place to square images of another size."""
        if _is_vit(model):
            resize_timm(model, image_size)

    @classmethod
    def shallow(cls, config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
        """The configuration of a model with some of the blocks."""
        fields = config.to_dict()
        fields["model_args"] = {**(config.model_args or {}), "depth": len(kept)}
        return type(config).from_dict(fields)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The blocks, in order."""
        return self._layers

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the first stage, hidden states for the others.
        """
        (vit,) = self._vit
        if self.is_first:
            images = hidden_states.to(next(vit.patch_embed.parameters()).dtype)
            hidden_states = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for layer in self._layers:
            hidden_states = layer(hidden_states)
        return vit.forward_head(vit.norm(hidden_states)) if self.is_last else hidden_states


def _is_vit(model: PreTrainedModel) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model.timm_model, VisionTransformer)
