"""How the code behind a converted checkpoint turns an image into pixels when it tests a model."""

from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Resampling
from transformers import PreTrainedConfig, ViTImageProcessorPil


@dataclass(frozen=True)
class OfficialPixels:
    """
    The evaluation transform of an official code.

    Args:
        mean (`list[float]`), std (`list[float]`): Of each channel.
        resample (`Resampling`): Filter of every resize.
        enlargement (`float`): The shorter side is resized to so many times the model's image size, whose square is
            then cut out of the center. 1: the whole image is resized to it.
        largest_uncut (`int`): Largest image size at which the whole image is resized all the same.
        image_size (`int`, *optional*): Size of the images, if it is not the one that the model's positions are for.
    """

    mean: list[float]
    std: list[float]
    resample: Resampling
    enlargement: float = 1.0
    largest_uncut: int = 0
    image_size: int | None = None

    def processor(self, config: PreTrainedConfig) -> ViTImageProcessorPil:
        """The image processor of a model. If its images are not square, they are resized as a whole."""
        size = self.image_size or config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        target = {"height": height, "width": width}
        sizes: dict[str, Any] = {"size": target}
        if self.enlargement > 1 and height == width > self.largest_uncut:
            short = {"shortest_edge": int(self.enlargement * height)}
            sizes = {"size": short, "do_center_crop": True, "crop_size": target}
        return ViTImageProcessorPil(
            **sizes, do_convert_rgb=True, resample=self.resample, image_mean=self.mean, image_std=self.std
        )


# m2mKD's NACs, V-MoEs, teachers and meta models. Images of up to 32 pixels (CIFAR) are not cropped.
M2MKD_PIXELS = OfficialPixels(
    [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], Resampling.BICUBIC, enlargement=256 / 224, largest_uncut=32
)
# google-research/vmoe: value_range(-1, 1), and a resize as for its fine-tuned models.
VMOE_JAX_PIXELS = OfficialPixels([0.5] * 3, [0.5] * 3, Resampling.BILINEAR)
# DINOv2: positions for 518 pixels, evaluated at 224, as in the image processors of the published ones.
DINOV2_PIXELS = replace(M2MKD_PIXELS, largest_uncut=0, image_size=224)
