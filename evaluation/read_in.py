"""Where the input latents of a NAC look in an image."""

import torch

from m2mkd.errors import StageError
from m2mkd.modeling.modeling_nac import NACForImageClassification


@torch.no_grad()
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
    attention = model.nac.read_in.attention
    seen: list[torch.Tensor] = []
    # queries and keys as the attention compares them, whatever its backend
    modules = (attention.sender_layernorm, attention.k_proj)
    hooks = [module.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for module in modules]
    try:
        model(pixel_values)
    except ValueError as error:
        raise StageError(f"The model cannot read these images: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    tokens, queries = (output.float() for output in seen)
    weights = torch.einsum("buhx,btx->buht", queries * attention.scaling, tokens).softmax(dim=-1).mean(dim=2)
    rows = pixel_values.shape[-2] // model.config.token_stride
    return weights.unflatten(-1, (rows, -1)).cpu()
