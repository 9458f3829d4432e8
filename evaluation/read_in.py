"""Where the input latents of a NAC look in an image."""

import torch

from m2mkd.errors import StageError
from m2mkd.evaluation.overlay import attention_of_latents
from m2mkd.modeling.modeling_nac import NACForImageClassification


def read_in_attention(model: NACForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Compute the attention of the input latents to the tokens of an image, averaged over the heads (NAC, arXiv
    2210.08031, read-in). The model has to be in evaluation mode.

    Args:
        model (`NACForImageClassification`)
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`)

    Returns:
        `torch.Tensor` of shape `(batch_size, num_input_latents, token_rows, token_columns)`; it sums to 1 over the
        tokens.

    Raises:
        `StageError`: the model does not take images of this size.
    """
    try:
        return attention_of_latents(model, pixel_values)
    except ValueError as error:
        raise StageError(f"The model cannot read these images: {error}") from error
