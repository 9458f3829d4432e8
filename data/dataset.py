"""The data set of labeled images that a Trainer reads."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from m2mkd.data.augmentation import (
    IMAGENET_CROP_AREA,
    color_jitter,
    random_affine,
    random_resized_crop_flip,
)
from m2mkd.data.config import DataConfig
from m2mkd.data.labeled_images import LabeledImages
from m2mkd.data.mixing import mix_batch, random_erasing
from m2mkd.data.processing import PixelTransform, pil_resample
from m2mkd.data.rand_augment import rand_augment


Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]
Sample = dict[str, torch.Tensor | int]
FINGERPRINT_IMAGES = 8
OF_BATCH = 1  # last element of the seed of everything that is drawn once per batch


def _augmentation(config: DataConfig) -> Augmentation | None:
    augmentations = {"affine": random_affine, "crop_flip": _crop_flip, "imagenet": _imagenet}
    augment = augmentations.get(config.augmentation)
    return augment if augment in (None, random_affine) else partial(augment, config=config)


def _crop_flip(image: Image.Image, rng: np.random.Generator, config: DataConfig) -> Image.Image:
    image = random_resized_crop_flip(image, config.image_size, pil_resample(config), rng)
    return color_jitter(image, config.color_jitter, rng) if config.color_jitter else image


def _imagenet(image: Image.Image, rng: np.random.Generator, config: DataConfig) -> Image.Image:
    resample = pil_resample(config)
    image = random_resized_crop_flip(image, config.image_size, resample, rng, IMAGENET_CROP_AREA)
    return rand_augment(image, resample, tuple(min(255, max(0, round(255 * mean))) for mean in config.mean), rng)


class SamplePixels:
    """Transform from an image to the input pixels of a network.

    In training the image is augmented. Otherwise the pixels are those of the image processor.

    Args:
        config: size, normalization and augmentation.
        train: whether to augment.
    """

    def __init__(self, config: DataConfig, train: bool) -> None:
        self.erasing = config.random_erasing if train else 0.0
        self._augment = _augmentation(config) if train else None
        self._pixels = PixelTransform(config, is_cropped=train and config.augmentation in ("crop_flip", "imagenet"))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Convert a `PIL.Image` of mode RGB and any size to float32 (3, image_size, image_size).

        `rng` is the generator of this sample.
        """
        pixel_values = self._pixels(image if self._augment is None else self._augment(image, rng))
        return random_erasing(pixel_values, self.erasing, rng) if self.erasing else pixel_values


def mix_samples(samples: list[Sample], num_labels: int, config: DataConfig, rng: np.random.Generator) -> list[Sample]:
    """Mix the samples with each other (see `mix_batch`). Their labels become float32 (num_labels,)."""
    pixel_values, labels = mix_batch(
        torch.stack([sample["pixel_values"] for sample in samples]),
        torch.tensor([sample["labels"] for sample in samples]),
        num_labels,
        config.mixup,
        config.cutmix,
        rng,
    )
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels, strict=True)]


class ImageDataset(Dataset[Sample]):
    """Samples `{"pixel_values": float32 (3, image_size, image_size), "labels": int}`, without `labels` if the set has
    none.

    A training sample is augmented by a pure function of (seed, view, index), so the order of access, the number of
    workers and an interrupted run change nothing. The view is the epoch, modulo `config.views` if that is given. An
    index is a position or, if images are repeated, a pair (position, repeat). An evaluation sample is never augmented.

    Mixup and CutMix are applied when a `DataLoader` fetches a whole batch; its samples then have float32 labels
    (classes,), which sum to 1. Their random numbers depend on the index of the first sample of the batch.

    Args:
        data: the images and labels.
        config: size, normalization and augmentation.
        train: whether to augment.
        seed: seed of the augmentation, at least 0.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, data: LabeledImages, config: DataConfig, train: bool, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        self.data = data
        self.config = config
        self.train = train
        self.seed = seed
        self._pixels = SamplePixels(config, train)
        # Shared memory, because persistent workers have copies of this object that were made before the epoch changes.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __setstate__(self, state: dict) -> None:
        """Move the epoch back to shared memory: after pickling or a deep copy it is an ordinary tensor."""
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    @property
    def possible(self) -> np.ndarray | None:
        """Labels that a sample can have, in ascending order, or `None` for all; see `LabeledImages`."""
        return self.data.possible

    @property
    def epoch(self) -> int:
        """The epoch that determines the augmentation of the next sample."""
        return int(self._epoch)

    @property
    def view(self) -> int:
        """The view of every image in this epoch."""
        return self.epoch if self.config.num_views is None else self.epoch % self.config.num_views

    def fingerprint(self) -> dict[str, Any]:
        """What all views of the images follow from, as plain values; of the pixels, those of a few images."""
        digest = hashlib.sha256("\n".join(self.data.names).encode() + self.data.labels.tobytes())
        for position in np.linspace(0, len(self) - 1, min(FINGERPRINT_IMAGES, len(self))).round().astype(int):
            digest.update(self.data.images[int(position)].tobytes())
        own = {"images": len(self), "seed": self.seed, "sha256": digest.hexdigest()}
        return {**self.config.model_dump(mode="json"), **own}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the augmentation, also for workers that already run. Call it between two epochs.

        With one process a Trainer calls it. With several it does not: accelerate finds a seedable sampler first and
        stops there (`DataLoaderShard.set_epoch`), so a distributed run needs a callback that calls it at the start of
        each epoch.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must be at least 0")
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        """The sample at `index`, a position or a pair (position, repeat). A position may be negative, as in a list.

        Raises:
            IndexError: `index` is outside the data set.
            DataError: the image cannot be decoded.
        """
        position, repeat = self._place(index)
        image = self.data.images[position]
        rng = np.random.default_rng((self.seed, self.view, position, *([repeat] if repeat else [])))
        return {"pixel_values": self._pixels(image, rng), **self.label(position)}

    def label(self, position: int) -> Sample:
        """The label at a position, as `labels`; nothing if the set has none."""
        return {"labels": int(self.data.labels[position])} if self.config.is_labeled else {}

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """The samples of a batch, mixed with each other if the configuration asks for it. A `DataLoader` calls it.

        Raises:
            IndexError, DataError: as for a single sample.
        """
        samples = [self[index] for index in indices]
        if not self.train or not (self.config.mixup or self.config.cutmix):
            return samples
        rng = np.random.default_rng((self.seed, self.epoch, *self._place(indices[0]), OF_BATCH))
        return mix_samples(samples, len(self.data.class_names), self.config, rng)

    def _place(self, index: int | tuple[int, int]) -> tuple[int, int]:
        """Position and repeat of a sample."""
        position, repeat = index if isinstance(index, tuple) else (int(index), 0)
        place = position + len(self) if position < 0 else position
        if not 0 <= place < len(self):
            raise IndexError(f"index {position} is out of range for {len(self)} samples")
        return place, repeat
