"""Random changes of a PIL image that keep its class. All randomness comes from the generator that is passed in."""

import math

import numpy as np
from PIL import Image, ImageEnhance


MAX_ROTATION = math.radians(12)
MAX_SHEAR = math.radians(8)
SCALE = (0.85, 1.15)
MAX_SHIFT = 0.10  # fraction of the side

CROP_AREA = (0.35, 1.0)  # fraction of the image
IMAGENET_CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
CROP_ATTEMPTS = 10


def random_affine(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rotate (±12°), shear (±8°), scale (0.85 to 1.15) and shift (±10 % of each side) around the center.

    Args:
        image: image of any mode and size; areas that move in from outside are black.
        rng: random generator; five numbers are drawn.

    Returns:
        An image of the same mode and size, resampled with the bilinear filter.
    """
    draw = rng.uniform(-1.0, 1.0, size=5).tolist()
    angle, shear = draw[0] * MAX_ROTATION, math.tan(draw[1] * MAX_SHEAR)
    scale = SCALE[0] + (draw[2] + 1) / 2 * (SCALE[1] - SCALE[0])
    width, height = image.size
    cosine, sine = math.cos(angle), math.sin(angle)
    # Forward, about the center c: out = c + shift + scale * R(angle) * [[1, shear], [0, 1]] * (in - c).
    # Pillow wants the inverse, in = c + [[1, -shear], [0, 1]] * R(-angle) / scale * (out - c - shift).
    a, b = (cosine + shear * sine) / scale, (sine - shear * cosine) / scale
    d, e = -sine / scale, cosine / scale
    x, y = width * (0.5 + draw[3] * MAX_SHIFT), height * (0.5 + draw[4] * MAX_SHIFT)
    inverse = (a, b, width / 2 - a * x - b * y, d, e, height / 2 - d * x - e * y)
    return image.transform(image.size, Image.Transform.AFFINE, inverse, resample=Image.Resampling.BILINEAR)


def _random_box(
    width: int, height: int, rng: np.random.Generator, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a random crop box (left, top, right, bottom), in pixels, inside an image of the given size."""
    for _ in range(CROP_ATTEMPTS):
        pixels = rng.uniform(*area) * width * height
        # Uniform in the logarithm, so that wide and tall crops are equally likely.
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        crop_width, crop_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    # For a very long image, take the largest centered box with an allowed ratio.
    crop_width = max(1, min(width, round(height * CROP_RATIO[1])))
    crop_height = max(1, min(height, round(width / CROP_RATIO[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def random_resized_crop_flip(
    image: Image.Image,
    image_size: int,
    resample: Image.Resampling,
    rng: np.random.Generator,
    area: tuple[float, float] = CROP_AREA,
) -> Image.Image:
    """Crop a fraction of the area at a ratio of 3/4 to 4/3, resize it, and mirror it with probability 1/2.

    Args:
        image: image of any size.
        image_size: side of the result, in pixels.
        resample: filter of the resize.
        rng: random generator; the number of draws depends on the image.
        area: smallest and largest fraction of the area.

    Returns:
        An image (image_size, image_size) of the same mode.
    """
    # Crop first, as torchvision does: with `resize(box=...)` the filter would read pixels outside the box.
    crop = image.crop(_random_box(*image.size, rng, area)).resize((image_size, image_size), resample)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation in random order, each by a factor of 1 ± strength (at least 0).

    Args:
        image: image of mode RGB and any size.
        strength: largest relative change; 0.4 in timm.
        rng: random generator; the number of draws is fixed.
    """
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=len(kinds)).tolist()
    for index in rng.permutation(len(kinds)).tolist():
        image = kinds[index](image).enhance(factors[index])
    return image
