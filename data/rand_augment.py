"""RandAugment of single images, as in timm's `rand-m9-mstd0.5-inc1` (Cubuk et al., arXiv 1909.13719)."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


NUM_OPERATIONS = 2  # operations drawn for each image, with replacement
CHANCE = 0.5  # probability that a drawn operation is applied
MAGNITUDE, MAGNITUDE_STD, MAX_MAGNITUDE = 9.0, 0.5, 10.0

# Values at the largest magnitude.
MAX_ROTATION = 30.0  # degrees
MAX_SHEAR = 0.3
MAX_SHIFT = 0.45  # fraction of the side
MAX_ENHANCEMENT = 0.9  # distance of the factor from 1; a factor of 1 changes nothing
SOLARIZE_ADD_BELOW = 128

# (image, fraction of the largest magnitude, sign, filter, fill color) -> image
Operation = Callable[[Image.Image, float, int, Image.Resampling, tuple[int, ...]], Image.Image]


def _affine(inverse: Callable[[Image.Image, float], tuple[float, ...]]) -> Operation:
    """`inverse` gives the coefficients for an image and the signed fraction of the largest magnitude."""
    return lambda image, share, sign, resample, fill: image.transform(
        image.size, Image.Transform.AFFINE, inverse(image, sign * share), resample=resample, fillcolor=fill
    )


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, share, sign, resample, fill: kind(image).enhance(1 + sign * share * MAX_ENHANCEMENT)


def _each_value(change: Callable[[int, float], int]) -> Operation:
    return lambda image, share, sign, resample, fill: image.point(
        [change(value, share) for value in range(256)] * len(image.getbands())
    )


def _posterize(value: int, share: float) -> int:
    """Keep 4 to 0 of 8 bits. Pillow's version does not accept 0 (a black image), which the largest magnitude needs."""
    dropped = 4 + int(share * 4)
    return value >> dropped << dropped


def _solarize_add(value: int, share: float) -> int:
    """Lighten the darker half of the values."""
    return min(255, value + int(share * 110)) if value < SOLARIZE_ADD_BELOW else value


# "inc1": the operations get stronger with the magnitude. Solarize inverts values above a threshold and Posterize keeps
# a number of bits; both the threshold and the number of bits go down to zero.
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, share, sign, resample, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, share, sign, resample, fill: ImageOps.equalize(image),
    "invert": lambda image, share, sign, resample, fill: ImageOps.invert(image),
    "rotate": lambda image, share, sign, resample, fill: image.rotate(
        sign * share * MAX_ROTATION, resample, fillcolor=fill
    ),
    "posterize": _each_value(_posterize),
    "solarize": lambda image, share, sign, resample, fill: ImageOps.solarize(image, 256 - int(share * 256)),
    "solarize_add": _each_value(_solarize_add),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda image, amount: (1, amount * MAX_SHEAR, 0, 0, 1, 0)),
    "shear_y": _affine(lambda image, amount: (1, 0, 0, amount * MAX_SHEAR, 1, 0)),
    "translate_x": _affine(lambda image, amount: (1, 0, amount * MAX_SHIFT * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda image, amount: (1, 0, 0, 0, 1, amount * MAX_SHIFT * image.height)),
}
_NAMES = tuple(OPERATIONS)


def draw_operations(rng: np.random.Generator) -> list[tuple[str, float, int]]:
    """Draw the operations for one image: name, fraction of the largest magnitude in [0, 1], and sign of each.

    Args:
        rng: random generator; the number of draws is fixed.
    """
    drawn = []
    for _ in range(NUM_OPERATIONS):
        name, applied = _NAMES[rng.integers(len(_NAMES))], rng.random() < CHANCE
        magnitude = min(max(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0.0), MAX_MAGNITUDE)
        sign = 1 if rng.random() < 0.5 else -1
        if applied:
            drawn.append((name, magnitude / MAX_MAGNITUDE, sign))
    return drawn


def rand_augment(
    image: Image.Image, resample: Image.Resampling, fill: tuple[int, ...], rng: np.random.Generator
) -> Image.Image:
    """Draw two of fifteen operations and apply each with probability 1/2, at a magnitude of 9 ± 0.5 out of 10.

    Args:
        image: image of mode RGB and any size.
        resample: filter of the operations that move pixels.
        fill: color (R, G, B) in 0..255 of areas that move in from outside; timm takes the mean of the data.
        rng: random generator; the number of draws does not depend on the image.

    Returns:
        An image of the same mode and size.
    """
    for name, share, sign in draw_operations(rng):
        image = OPERATIONS[name](image, share, sign, resample, fill)
    return image
