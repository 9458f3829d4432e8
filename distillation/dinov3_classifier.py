"""A classifier on a DINOv3-ViT, for which transformers has only the backbone."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, DINOv3ViTConfig, DINOv3ViTModel, DINOv3ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel):
    """
    A DINOv3-ViT (arXiv 2508.10104) with a linear head on its class token, as in the linear probes of its paper.

    Args:
        config (`DINOv3ViTConfig`)
    """

    base_model_prefix = "dinov3_vit"

    def __init__(self, config: DINOv3ViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov3_vit = DINOv3ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`)
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): Class indices, for the loss.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`] with `logits` of shape `(batch_size, num_labels)`.
        """
        outputs = self.dinov3_vit(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


AutoModelForImageClassification.register(DINOv3ViTConfig, DINOv3ViTForImageClassification, exist_ok=True)
