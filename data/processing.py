"""The evaluation transform in two forms: a fast one for our data sets, and the image processor saved with a model."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor

from m2mkd.data.config import DataConfig
from m2mkd.errors import DataError


def pil_resample(config: DataConfig) -> Image.Resampling:
    """Pillow's filter for `config.resample`."""
    return Image.Resampling[config.resample.upper()]


def build_image_processor(config: DataConfig) -> ViTImageProcessorPil:
    """Build the Hugging Face image processor that gives the same pixels as `PixelTransform`.

    It is explicitly the Pillow backend, so that its output is the same with and without torchvision. It is saved as an
    ordinary `ViTImageProcessor`.
    """
    square = {"height": config.image_size, "width": config.image_size}
    pixels = {
        "do_convert_rgb": True,
        "resample": pil_resample(config),
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    if config.center_crop is None:
        return ViTImageProcessorPil(size=square, **pixels)
    short = {"shortest_edge": _short_side(config.image_size, config.center_crop)}
    return ViTImageProcessorPil(size=short, do_center_crop=True, crop_size=square, **pixels)


def _short_side(image_size: int, center_crop: float) -> int:
    """Length of the shorter side in pixels before the center is cut out: 256 for 224 at 0.875, 73 for 64."""
    return int(image_size / center_crop + 1e-9)  # 64 / (64 / 73) must be 73 again


def pixels_of_processor(processor: BaseImageProcessor, source: str) -> dict[str, Any]:
    """Settings of a `DataConfig` that give the same pixels as an image processor.

    Args:
        processor: image processor of a saved model. It must apply a square resize, or a resize of the shorter side and
            a center crop.
        source: name of the model in an error.

    Returns:
        `image_size`, `center_crop`, `resample`, `mean` and `std`.

    Raises:
        DataError: the processor applies any other transform.
    """
    said = processor.to_dict()
    size, crop = dict(said["size"]), dict(said.get("crop_size") or {})
    is_crop, short = bool(said.get("do_center_crop")), size.get("shortest_edge")
    square = crop if is_crop else size
    side = square.get("height")
    resample = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}.get(said.get("resample"))
    fits = side is not None and side == square.get("width") and (short is not None) == is_crop and resample
    if not fits or not said.get("do_rescale") or abs(said["rescale_factor"] * 255 - 1) > 1e-6:
        raise DataError(
            f"the image processor of {source} resizes to {size}, crops to {crop}, resample={said.get('resample')}, "
            f"rescale_factor={said.get('rescale_factor')}. Only these can be reproduced here: a resize to a square "
            "(bilinear or bicubic), or a resize of the shorter side and a center crop, with pixels in [0, 1]"
        )
    normalize = said.get("do_normalize")
    return {
        "image_size": side,
        "center_crop": side / short if is_crop else None,
        "resample": resample,
        "mean": tuple(said["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        "std": tuple(said["image_std"]) if normalize else (1.0, 1.0, 1.0),
    }


class PixelTransform:
    """Resize to (image_size, image_size), or resize and cut out the center, scale to [0, 1] and normalize.

    It is bit-equal to `build_image_processor(config)`, and several times faster: a byte has 256 values, so the
    arithmetic of each channel is done once, for a table.

    Args:
        config: configuration with image_size, center_crop, resample, mean and std.
        is_cropped: whether an augmentation has already brought the images to their size.
    """

    def __init__(self, config: DataConfig, is_cropped: bool = False) -> None:
        self.center_crop = None if is_cropped else config.center_crop
        self.size = (config.image_size, config.image_size)
        self.resample = pil_resample(config)
        # Same precisions as transformers: scale in float64, round to float32, normalize in float32.
        unit = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
        mean = np.array(config.mean, dtype=np.float32)[:, None]
        std = np.array(config.std, dtype=np.float32)[:, None]
        self.tables = (unit - mean) / std

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Convert a `PIL.Image` of mode RGB and any size to float32 (3, image_size, image_size)."""
        pixels = np.asarray(self._sized(image))
        out = np.empty((3, *self.size), dtype=np.float32)
        for channel, table in enumerate(self.tables):
            # "clip" never clips a byte; it only saves numpy a copy of the output.
            np.take(table, pixels[:, :, channel], out=out[channel], mode="clip")
        return torch.from_numpy(out)

    def _sized(self, image: Image.Image) -> Image.Image:
        if self.center_crop is None:
            return image.resize(self.size, self.resample)
        side, short = self.size[0], _short_side(self.size[0], self.center_crop)
        # rounded down, as transformers does
        width, height = (max(short, int(short * edge / min(image.size))) for edge in image.size)
        if width * height > 2 * Image.MAX_IMAGE_PIXELS:
            raise DataError(
                f"an image of {image.width} x {image.height} pixels would become {width} x {height}: crop it, or "
                "remove it"
            )
        left, top = (width - side) // 2, (height - side) // 2
        return image.resize((width, height), self.resample).crop((left, top, left + side, top + side))
