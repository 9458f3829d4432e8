"""Labelled images as the data set that a Trainer reads."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from m2mkd.data.augmentation import random_affine, random_resized_crop_flip
from m2mkd.data.config import DataConfig
from m2mkd.data.labeled_images import LabeledImages
from m2mkd.data.processing import PixelTransform, pil_resample


Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]


def _augmentation(config: DataConfig) -> Augmentation | None:
    if config.augmentation == "affine":
        return random_affine
    if config.augmentation == "crop_flip":
        return partial(_crop_flip, image_size=config.image_size, resample=pil_resample(config))
    return None


def _crop_flip(
    image: Image.Image, rng: np.random.Generator, image_size: int, resample: Image.Resampling
) -> Image.Image:
    return random_resized_crop_flip(image, image_size, resample, rng)


class ImageDataset(Dataset[dict[str, torch.Tensor | int]]):
    """Samples `{"pixel_values": float32 (3, image_size, image_size), "labels": int}`.

    A training sample is augmented by a pure function of (seed, epoch, index): the order of access, the number of
    workers and an interrupted run change nothing. An evaluation sample is never augmented.

    Args:
        data: the images and labels.
        config: size, normalisation and augmentation.
        train: whether to augment.
        seed: of the augmentation, at least 0.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, data: LabeledImages, config: DataConfig, train: bool, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed}: it must be at least 0")
        self.data = data
        self.config = config
        self.train = train
        self.seed = seed
        self._pixels = PixelTransform(config)
        self._augment = _augmentation(config) if train else None
        # Shared memory: persistent workers hold copies of this object, made long before the epoch changes.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __setstate__(self, state: dict) -> None:
        """After pickling and deep copies the epoch is an ordinary tensor: move it back to shared memory."""
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    @property
    def epoch(self) -> int:
        """The epoch whose augmentation the next sample gets."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of an epoch, also for workers that already run. Call it between two epochs.

        In one process a Trainer calls it. In several it does not: accelerate finds a seedable sampler first and stops
        there (`DataLoaderShard.set_epoch`), so a distributed run needs a callback that calls it at each epoch's start.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: it must be at least 0")
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """The sample at `index`, which may be negative as in a list.

        Raises:
            IndexError: `index` is outside the data set.
            DataError: the image cannot be decoded.
        """
        position = int(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} into {len(self)} samples")
        image = self.data.images[position]
        if self._augment is not None:
            image = self._augment(image, np.random.default_rng((self.seed, self.epoch, position)))
        return {"pixel_values": self._pixels(image), "labels": int(self.data.labels[position])}
