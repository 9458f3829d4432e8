"""
What a model does with single images, as colors above them: the experts of each patch of a V-MoE, and where the input
latents of a NAC look. This file imports nothing of ours, because a demo Space carries it without the package.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from transformers import PreTrainedConfig, PreTrainedModel


# Okabe and Ito's colors for the color-blind, but for black and grey, which the images have
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442", "#882255")
OPACITY = (0.2, 0.85)  # from weight 0 to the largest weight of a layer
MOST_LATENTS = 4
SMALLEST_NUMBERED_CELL = 12  # pixels


@dataclass(frozen=True)
class Overlay:
    """
    Cells above an image.

    Attributes:
        name: Such as `layer 3`.
        text: What it shows, in words.
        cells: uint8 RGBA `(rows, columns, 4)`.
        marks: A short text for each cell, row by row; empty for none.
    """

    name: str
    text: str
    cells: np.ndarray
    marks: list[str]


@torch.no_grad()
def weights_of_patches(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
    """What `patch_weights` returns. Raises `ValueError` if the model does not take the images."""
    outputs = model.vmoe(pixel_values, output_router_logits=True, output_dropped_mask=True)
    layers = sorted(model.config.moe_layers)
    per_token = outputs.last_hidden_state.new_empty(*outputs.last_hidden_state.shape[:2], model.config.num_experts)
    weights = {}
    masks = outputs.dropped_mask or [None] * len(layers)
    for layer, logits, dropped_mask in zip(layers, outputs.router_logits or (), masks, strict=True):
        router = model.vmoe.layers[layer].mlp.router
        joined = router.join_groups(router.weights_by_expert(logits, dropped_mask), per_token)
        weights[layer] = joined[:, model.config.num_special_tokens :].float().cpu()
    return weights


@torch.no_grad()
def attention_of_latents(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What `read_in_attention` returns. Raises `ValueError` if the model does not take the images."""
    attention = model.nac.read_in.attention
    seen: list[torch.Tensor] = []
    # queries and keys as the attention compares them, whatever its backend
    modules = (attention.sender_layernorm, attention.k_proj)
    hooks = [module.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for module in modules]
    try:
        model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    tokens, queries = (output.float() for output in seen)
    weights = torch.einsum("buhx,btx->buht", queries * attention.scaling, tokens).softmax(dim=-1).mean(dim=2)
    rows = pixel_values.shape[-2] // model.config.token_stride
    return weights.unflatten(-1, (rows, -1)).cpu()


def num_choices(config: PreTrainedConfig) -> int:
    """Experts that a patch of a V-MoE shows."""
    return config.num_experts_per_tok if config.router_type == "token_choice" else 1


def choices(weights: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The experts with the largest weights, and the opacity that shows the weight.

    Args:
        weights (`torch.Tensor` of shape `(..., num_patches, num_experts)`)
        number (`int`): Experts per patch.

    Returns:
        Two tensors of shape `(..., num_patches, number)`. The opacity is 0 where no expert takes the patch.
    """
    top, experts = weights.topk(number, dim=-1)
    opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * top / top.max().clamp(min=1e-12)
    return experts, opacity.masked_fill(top == 0, 0.0)


def selective(attention: torch.Tensor, most: int) -> list[int]:
    """Of latents with `attention` `(batch_size, num_latents, rows, columns)`, those that look at the fewest tokens."""
    entropy = torch.special.entr(attention).sum(dim=(-1, -2)).mean(dim=0)
    return entropy.argsort(stable=True)[:most].sort().values.tolist()


def overlays(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[Overlay]:
    """
    The overlays of one image.

    Args:
        model (`VMoEForImageClassification` or `NACForImageClassification`): In evaluation mode. A V-MoE with groups of
            tokens routes each image alone from now on.
        pixel_values (`torch.Tensor` of shape `(1, num_channels, height, width)`)

    Returns:
        For a V-MoE, the experts of each patch in each sparse layer (and ensemble member); for a NAC, the attention of
        all input latents and of the most selective ones. Empty for another model.
    """
    draw = _OVERLAYS.get(model.config.model_type)
    return [] if draw is None else draw(model, pixel_values)


def paint(picture: Image.Image, overlay: Overlay, side: int = 168) -> Image.Image:
    """Draw an overlay above a pale, grey `picture`; the longer side of the result is about `side` pixels long."""
    rows, columns = overlay.cells.shape[:2]
    scale = side / max(picture.size)
    size = tuple(round(scale * edge) for edge in picture.size)
    below = picture.convert("L").resize(size).point(lambda value: 0.6 * 255 + 0.4 * value).convert("RGBA")
    colors = Image.fromarray(overlay.cells, "RGBA").resize(size, Image.Resampling.NEAREST)
    painted = Image.alpha_composite(below, colors).convert("RGB")
    pen, width, height = ImageDraw.Draw(painted), size[0] / columns, size[1] / rows
    for place, mark in enumerate(overlay.marks):
        x, y = (place % columns) * width, (place // columns) * height
        pen.rectangle((x, y, x + width, y + height), outline="white")
        if min(width, height) >= SMALLEST_NUMBERED_CELL:
            center = (x + width / 2, y + height / 2)
            pen.text(center, mark, fill="black", anchor="mm", stroke_width=1, stroke_fill="white")
    return painted


def _routing(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[Overlay]:
    if model.config.router_group_size is not None:
        model.set_router(router_group_size=None)
    members = model.config.num_ensemble_members
    palette = np.array([ImageColor.getrgb(color) for color in COLORS], dtype=np.uint8)
    found = []
    for layer, of_layer in weights_of_patches(model, pixel_values).items():
        for member, weights in enumerate(of_layer):
            experts, opacity = (part.numpy() for part in choices(weights, num_choices(model.config)))
            alpha = np.round(255 * opacity).astype(np.uint8)
            height, width = pixel_values.shape[-2:]
            rows = round((len(weights) * height / width) ** 0.5)
            cells = np.concatenate([palette[experts % len(COLORS)], alpha[..., None]], axis=-1)
            marks = [str(expert) if seen else "×" for expert, seen in zip(experts.flat, opacity.flat, strict=True)]
            name = f"layer {layer}" + (f", member {member}" if members > 1 else "")
            seen = Counter(experts[:, 0][alpha[:, 0] > 0].tolist())
            said = [f"expert {expert}: {count}" for expert, count in sorted(seen.items())]
            said += [f"none: {without}"] if (without := int((alpha[:, 0] == 0).sum())) else []
            text = f"{name}, patches by their first expert: {', '.join(said)}"
            found.append(Overlay(name, text, cells.reshape(rows, -1, 4), marks))
    return found


def _read_in(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[Overlay]:
    (attention,) = attention_of_latents(model, pixel_values)
    maps = {f"mean of {len(attention)} latents": attention.mean(dim=0)}
    maps |= {f"latent {latent}": attention[latent] for latent in selective(attention[None], MOST_LATENTS)}
    found = []
    for name, weights in maps.items():
        row, column = divmod(int(weights.argmax()), weights.shape[1])
        text = f"{name}: looks most at row {row + 1}, column {column + 1} of {weights.shape[0]} × {weights.shape[1]}"
        color = np.broadcast_to(np.array(ImageColor.getrgb(COLORS[4]), dtype=np.uint8), (*weights.shape, 3))
        alpha = (255 * OPACITY[1] * weights / weights.max()).round().numpy().astype(np.uint8)
        found.append(Overlay(name, text, np.concatenate([color, alpha[..., None]], axis=-1), []))
    return found


_OVERLAYS: dict[str, Callable[[PreTrainedModel, torch.Tensor], list[Overlay]]] = {"vmoe": _routing, "nac": _read_in}
