"""Image data sets, augmentation and metrics. Importing the package loads none of the libraries behind its sources."""

from importlib import import_module
from typing import TYPE_CHECKING

from m2mkd.data.augmentation import random_affine, random_resized_crop_flip
from m2mkd.data.config import DataConfig
from m2mkd.data.labeled_images import LabeledImages, class_counts
from m2mkd.data.sources import load_images
from m2mkd.errors import DataError


if TYPE_CHECKING:
    from m2mkd.data.dataset import ImageDataset
    from m2mkd.data.metrics import Accuracy, PerClassAccuracy, TopKAccuracy, compute_metrics
    from m2mkd.data.processing import build_image_processor
    from m2mkd.data.sampling import RepeatedSampler

# These need torch, transformers or evaluate: seconds that a reader of a configuration should not pay.
_LAZY = {
    "Accuracy": "m2mkd.data.metrics",
    "ImageDataset": "m2mkd.data.dataset",
    "PerClassAccuracy": "m2mkd.data.metrics",
    "RepeatedSampler": "m2mkd.data.sampling",
    "TopKAccuracy": "m2mkd.data.metrics",
    "build_image_processor": "m2mkd.data.processing",
    "compute_metrics": "m2mkd.data.metrics",
}

__all__ = [
    "Accuracy",
    "DataConfig",
    "DataError",
    "ImageDataset",
    "LabeledImages",
    "PerClassAccuracy",
    "RepeatedSampler",
    "TopKAccuracy",
    "build_image_processor",
    "class_counts",
    "compute_metrics",
    "load_images",
    "random_affine",
    "random_resized_crop_flip",
]


def __getattr__(name: str) -> object:
    """Import the module behind a lazy name at its first use.

    Raises:
        AttributeError: `name` is not a public name of this package.
    """
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
