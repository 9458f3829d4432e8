"""Streaming of a `datasets` source, for sets that do not fit on the disk."""

import copy
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from m2mkd.data.config import DataConfig
from m2mkd.data.dataset import OF_BATCH, Sample, SamplePixels, mix_samples
from m2mkd.data.decoding import decode_image
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.known_sets import known_set, published_split
from m2mkd.errors import DataError


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # encoded rows in the shuffle buffer; the files are shuffled too
MIXED_AT_ONCE = 64  # samples that share a lambda; the batch size is not known here


class StreamedImages(IterableDataset[Sample]):
    """The samples of an `ImageDataset`, from a stream.

    In training, the files are shuffled again for each epoch, and the rows within a buffer of 1,000. The augmentation
    of a sample depends only on (seed, epoch, its bytes). Mixup and CutMix are applied to blocks of 64 samples. An
    epoch has as many samples as there are rows, also if images are repeated. Workers read different files if there
    are enough. With several processes, accelerate lets the first one read for all.

    Args:
        rows: encoded images and labels of one split.
        length: number of rows.
        labels: the label of each value of the label column.
        class_names: name of each label.
        config: columns, pixels and augmentation. A fraction `max_corrupt_share` of the images may be undecodable;
            these are logged and left out.
        train: whether to shuffle, augment and mix.
        seed: seed of the shuffling, the augmentation and the mixing, at least 0.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        length: int,
        labels: Mapping[Any, int],
        class_names: Sequence[str],
        config: DataConfig,
        train: bool,
        seed: int = 0,
    ) -> None:
        self.rows = rows
        self.length = length
        self.labels = labels
        self.class_names = list(class_names)
        self.config = config
        self.train = train
        self.seed = seed
        self.possible: np.ndarray | None = None
        self._pixels = SamplePixels(config, train)
        # Shared memory, because persistent workers have copies of this object.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of order and augmentation, also for workers that already run. Call it between two epochs."""
        self._epoch.fill_(epoch)

    def relabel(self, class_names: Sequence[str]) -> "StreamedImages":
        """The same stream over another list of classes (for example, those of a model), matched by name.

        Raises:
            DataError: a class of this set is not in `class_names`.
        """
        target = {name: label for label, name in enumerate(class_names)}
        missing = [name for name in self.class_names if name not in target]
        if missing:
            raise DataError(
                f"the model was trained without {len(missing)} of the {len(self.class_names)} classes of this stream, "
                f"for example {missing[0]}"
            )
        other = copy.copy(self)
        other.labels = {value: target[self.class_names[label]] for value, label in self.labels.items()}
        other.class_names = list(class_names)
        reached = np.array(sorted(target[name] for name in self.class_names), dtype=np.int64)
        other.possible = None if len(reached) == len(class_names) else reached
        return other

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples `{"pixel_values", "labels"}`, as in an `ImageDataset`.

        Raises:
            DataError: a value is not a label, or more images are corrupt than allowed.
        """
        samples = self._samples()
        if not self.train or not (self.config.mixup or self.config.cutmix):
            yield from samples
            return
        worker = get_worker_info()
        for number in count():
            block = list(islice(samples, MIXED_AT_ONCE))
            if not block:
                return
            place = (worker.id if worker else 0, number, OF_BATCH)
            rng = np.random.default_rng((self.seed, int(self._epoch), *place))
            yield from mix_samples(block, len(self.class_names), self.config, rng)

    def _samples(self) -> Iterator[Sample]:
        """Yield the decoded and augmented samples of this worker; `datasets` gives each worker its own files."""
        worker = get_worker_info()
        number, workers = (worker.id, min(worker.num_workers, self.rows.num_shards)) if worker else (0, 1)
        if number >= workers:
            return  # more workers than files
        epoch, repeats = int(self._epoch), self.config.repeated if self.train else 1
        share = len(range(number, self.length, workers))
        # Files differ in length. In training, a worker whose files run out starts them again, and every worker yields
        # exactly its part of the rows.
        left = share if self.train else math.inf
        may_fail = self.config.max_corrupt_share * share
        while left > 0:
            before = left
            for row in self._rows(epoch):
                for repeat in range(repeats):
                    sample = self._sample(row, epoch, repeat, may_fail)
                    if sample is None:
                        may_fail -= 1
                        break
                    yield sample
                    left -= 1
                    if not left:
                        return
            if not self.train or left == before:
                return

    def _rows(self, epoch: int) -> "datasets.IterableDataset":
        if not self.train:
            return self.rows
        rows = self.rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        rows.set_epoch(epoch)
        return rows

    def _sample(self, row: dict[str, Any], epoch: int, repeat: int, may_fail: float) -> Sample | None:
        """One sample, or `None` if its image is corrupt and `may_fail` allows it."""
        image, value = row[self.config.image_column], row[self.config.label_column]
        if value not in self.labels:
            raise DataError(f"{self.config.source} has a row with label {value!r}: use a labeled split")
        source = (image and (image["bytes"] or image["path"])) or b""
        name = f"{self.config.source}:{(image or {}).get('path') or 'an image'} of class {value!r}"
        try:
            decoded = decode_image(source, name)
        except DataError as error:
            if may_fail < 1:
                raise DataError(
                    f"{error}. max_corrupt_share={self.config.max_corrupt_share} allows no more corrupt images"
                ) from error
            logger.warning("left out: %s", error)
            return None
        key = zlib.crc32(source if isinstance(source, bytes) else source.encode())
        rng = np.random.default_rng((self.seed, epoch, key, *([repeat] if repeat else [])))
        return {"pixel_values": self._pixels(decoded, rng), "labels": self.labels[value]}


def open_stream(config: DataConfig, train: bool, seed: int = 0) -> StreamedImages:
    """Open the split that a configuration describes as a stream.

    Raises:
        DataError: the source cannot be opened, a column is missing, the number of rows is unknown, or the labels have
            no names.
    """
    import datasets

    known = known_set(config.source)
    split, length = config.split, None
    if known is not None:
        _, split, length = published_split(config)
        if length is None:
            raise DataError(
                f"{config.source} is a part of another set and cannot be streamed: download it (streaming: false), or "
                f"use a local copy, '{config.source}:PATH'"
            )
        image_column, label_column = known.columns
        own = {"source": known.hub, "image_column": image_column, "label_column": label_column}
        config = config.model_copy(update=own)
    try:
        rows = datasets.load_dataset(config.source, config.config_name, split=split, streaming=True)
    except Exception as error:  # builders raise almost any type
        raise DataError(
            f"datasets cannot stream source={config.source!r}, split={split!r} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(rows, datasets.IterableDataset):
        raise DataError(f"{config.source} has several splits, {sorted(rows)}: set split")
    missing = [name for name in (config.image_column, config.label_column) if name not in (rows.features or ())]
    if missing:
        raise DataError(f"{config.source} has no column {missing[0]!r}, its columns are {sorted(rows.features or ())}")
    labels, class_names = _labels(rows.features[config.label_column], None if known is None else known.marks, config)
    rows = rows.select_columns([config.image_column, config.label_column])
    rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    return StreamedImages(rows, length or _length(rows, config, split), labels, class_names, config, train, seed)


def _labels(feature: Any, marks: tuple[str, ...] | None, config: DataConfig) -> tuple[dict[Any, int], list[str]]:
    """The label of each value of a column, and the names of the labels."""
    import datasets

    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if marks is None:
        if names is None:
            raise DataError(
                f"label column {config.label_column!r} of {config.source} is {feature}: a stream needs a ClassLabel, "
                "because otherwise its classes are unknown until its end"
            )
        return {label: label for label in range(len(names))}, names
    classes = imagenet_classes(*marks)
    if names is None:
        return {wnid: label for label, wnid in enumerate(classes)}, classes
    if set(names) == set(classes):
        return {value: classes.index(name) for value, name in enumerate(names)}, classes
    if len(names) != len(classes):
        raise DataError(f"{config.source} has {len(names)} classes instead of {len(classes)}")
    return {label: label for label in range(len(classes))}, classes


def _length(rows: "datasets.IterableDataset", config: DataConfig, split: str | None) -> int:
    splits = rows.info.splits or {}
    length = splits[split].num_examples if split in splits else None
    if not length:
        raise DataError(
            f"{config.source} does not state the number of rows of split {split!r}, but the learning rate schedule "
            "needs it: download the set (streaming: false)"
        )
    return length
