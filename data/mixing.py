"""Augmentation of normalized pixels: random erasing of an image, and Mixup and CutMix of a batch with soft targets."""

import math

import numpy as np
import torch


CUTMIX_CHANCE = 0.5  # if both are switched on

ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
ERASED_RATIO = (0.3, 1 / 0.3)  # height / width
ERASE_ATTEMPTS = 10


def random_erasing(pixel_values: torch.Tensor, chance: float, rng: np.random.Generator) -> torch.Tensor:
    """Replace a box by noise of mean 0 and standard deviation 1 in every pixel (Zhong et al., arXiv 1708.04896).

    The box covers 2 to 33.3 % of the area, has an aspect ratio of 0.3 to 1 / 0.3, and is smaller than the image.

    Args:
        pixel_values: float32 (channels, height, width), normalized; changed in place.
        chance: probability that a box is erased, in [0, 1].
        rng: random generator; the number of draws depends on the box.
    """
    channels, height, width = pixel_values.shape
    if rng.random() >= chance:
        return pixel_values
    for _ in range(ERASE_ATTEMPTS):
        pixels = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        box_height, box_width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if box_height < height and box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            noise = rng.standard_normal((channels, box_height, box_width), dtype=np.float32)
            pixel_values[:, top : top + box_height, left : left + box_width] = torch.from_numpy(noise)
            break
    return pixel_values


def draw_mix(mixup: float, cutmix: float, rng: np.random.Generator) -> tuple[float, bool]:
    """Draw the weight of a batch's own images, and whether to use CutMix (`True`) or Mixup (`False`).

    Args:
        mixup: lambda of Mixup is drawn from Beta(mixup, mixup); 0 switches it off.
        cutmix: the same for CutMix.
        rng: random generator; at most two draws.
    """
    is_cutmix = bool(rng.random() < CUTMIX_CHANCE) if mixup and cutmix else bool(cutmix)
    alpha = cutmix if is_cutmix else mixup
    return float(rng.beta(alpha, alpha)), is_cutmix


def draw_box(height: int, width: int, weight: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a box (top, bottom, left, right) of about `1 - weight` of the area, with its center anywhere in the image.

    The box is clipped at the border, so it may be smaller.
    """
    side = np.sqrt(1 - weight)
    box_height, box_width = int(height * side), int(width * side)
    row, column = int(rng.integers(height)), int(rng.integers(width))
    top, left = row - box_height // 2, column - box_width // 2
    # box_height // 2 on either side, as in the official code, so the side of the box is even
    bottom, right = row + box_height // 2, column + box_width // 2
    return max(top, 0), min(bottom, height), max(left, 0), min(right, width)


def mix_batch(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    mixup: float,
    cutmix: float,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with its counterpart in the reversed batch, with one lambda and one box for the whole batch.

    Mixup (Zhang et al., arXiv 1710.09412) blends two images, `lambda x_i + (1 - lambda) x_j`. CutMix (Yun et al.,
    arXiv 1905.04899) pastes a box of the other image, and lambda becomes the fraction of the area that is kept. The
    targets are `lambda y_i + (1 - lambda) y_j`. Label smoothing is part of the loss (`label_smoothing_factor` of the
    training arguments); smoothing before or after the mix gives the same targets.

    Args:
        pixel_values: float32 (batch_size, channels, height, width); not changed.
        labels: int64 (batch_size,).
        num_labels: C.
        mixup, cutmix: parameters of the Beta distributions; 0 switches one off, but not both may be 0.
        rng: random generator of the batch.

    Returns:
        Mixed images of the same shape, and float32 targets (batch_size, C) whose rows sum to 1.
    """
    weight, is_cutmix = draw_mix(mixup, cutmix, rng)
    if is_cutmix:
        height, width = pixel_values.shape[-2:]
        top, bottom, left, right = draw_box(height, width, weight, rng)
        mixed = pixel_values.clone()
        mixed[:, :, top:bottom, left:right] = pixel_values[:, :, top:bottom, left:right].flip(0)
        weight = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = pixel_values.flip(0).lerp_(pixel_values, weight)
    targets = torch.nn.functional.one_hot(labels, num_labels).float()
    return mixed, targets * weight + targets.flip(0) * (1 - weight)
