"""A classifier that cannot be cut: one stage, which is the whole model."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m2mkd.distillation.stage import Stage


class WholeStage(Stage):
    """
    A classifier whose parts are not declared, or do not exchange tokens of one width (Swin, ConvNeXt, ResNet). It can
    teach only as a whole.
    """

    is_meta_source = False

    def __init__(self, model: PreTrainedModel, index: int, num_stages: int, layer_indices: range):
        super().__init__(model, index, num_stages, layer_indices)
        self._attach(model, *(name for name, _ in model.named_children()))
        self._model = (model,)

    @classmethod
    def count_layers(cls, model: PreTrainedModel) -> int:
        """The whole model counts as one layer."""
        return 1

    @classmethod
    def classifiers_of(cls, model: PreTrainedModel) -> list[nn.Module]:
        """The last linear layer, whatever it is called."""
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return linear[-1:]

    @classmethod
    def can_be_cut(cls, model: PreTrainedModel) -> bool:
        """Never."""
        return False

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`)
        """
        (model,) = self._model
        return model(pixel_values.to(next(model.parameters()).dtype), **kwargs).logits
