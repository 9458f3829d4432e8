"""How the code behind a converted checkpoint turns an image into pixels when it tests a model."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, ViTImageProcessorPil

from m2mkd.data.config import DataConfig
from m2mkd.data.processing import build_image_processor


@dataclass(frozen=True)
class OfficialPixels:
    """
    The evaluation transform of an official code.

    Args:
        mean (`tuple[float, float, float]`), std (`tuple[float, float, float]`): Of each channel.
        resample (`str`): `"bilinear"` or `"bicubic"`.
        center_crop (`float`, *optional*): See `DataConfig`; `None`: the whole image is resized.
        largest_uncut (`int`): Images of up to so many pixels are not cropped.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str
    center_crop: float | None = None
    largest_uncut: int = 0

    def processor(self, config: PreTrainedConfig) -> ViTImageProcessorPil:
        """The image processor of a model; where its images are not square, they are resized as a whole."""
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        is_cropped = height == width > self.largest_uncut
        data = DataConfig(
            source="official",
            image_size=height,
            mean=self.mean,
            std=self.std,
            resample=self.resample,
            center_crop=self.center_crop if is_cropped else None,
        )
        processor = build_image_processor(data)
        if height != width:
            processor.size = {"height": height, "width": width}
        return processor


# m2mKD's NACs, V-MoEs, teachers and meta models. Images of up to 32 pixels (CIFAR) stay as they are.
M2MKD_PIXELS = OfficialPixels(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resample="bicubic", center_crop=0.875, largest_uncut=32
)
# google-research/vmoe: value_range(-1, 1), and a resize as in its fine-tuned models.
VMOE_JAX_PIXELS = OfficialPixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resample="bilinear")


__all__ = ["M2MKD_PIXELS", "VMOE_JAX_PIXELS", "OfficialPixels"]
