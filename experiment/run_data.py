"""The data sets of a recipe, each loaded once and passed to the phases."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from m2mkd.data.config import DataConfig
from m2mkd.data.dataset import ImageDataset
from m2mkd.data.labeled_images import LabeledImages
from m2mkd.data.sources import load_images
from m2mkd.data.streaming import Sample, StreamedImages, open_stream
from m2mkd.errors import DataError
from m2mkd.experiment.recipe import Recipe


class RunData:
    """
    Data sets of a recipe, by their names in it.

    Args:
        recipe (`Recipe`)
        loaded (`dict`, *optional*): Images that are already loaded, by name, and place for more.
    """

    def __init__(self, recipe: Recipe, loaded: dict[str, LabeledImages] | None = None):
        self.recipe = recipe
        self._loaded = {} if loaded is None else loaded
        self._streamed_classes: dict[str, list[str]] = {}

    def check(self) -> None:
        """
        Check every set before anything is trained.

        Raises:
            `DataError`: a set cannot be loaded, a training set has a class without images, or a test set has a class
            that the arms are not trained on.
        """
        recipe = self.recipe
        meta = recipe.meta.data if recipe.meta is not None else None
        for name in (meta, recipe.teacher.data, recipe.distill.data, recipe.finetune.data):
            if name is not None:
                self.class_names(name)
        for name in (recipe.evaluation.iid, recipe.evaluation.ood):
            if name is not None:
                self.test_set(name, recipe.finetune.data, self.class_names(recipe.finetune.data))

    def describe(self) -> list[str]:
        """Describe each set that the run uses in one line."""
        return [describe_set(name, *self.size(name)) for name in self.recipe.used_data()]

    def size(self, name: str) -> tuple[int, list[str]]:
        """Number of images and class names of a data set as the recipe uses it."""
        config = self.config(name)
        data = self._stream(name, config, train=False) if config.streaming else self.images(name)
        return len(data), data.class_names if config.is_labeled else []

    def config(self, name: str) -> DataConfig:
        """The recipe's section about a data set."""
        return self.recipe.data[name]

    def images(self, name: str) -> LabeledImages:
        """The labelled images of a data set. Raises `DataError` if they cannot be loaded."""
        if name not in self._loaded:
            try:
                self._loaded[name] = load_images(self.config(name))
            except DataError as error:
                raise DataError(f"data.{name}: {error}") from error
        return self._loaded[name]

    def _stream(self, name: str, config: DataConfig, train: bool, seed: int = 0) -> StreamedImages:
        try:
            return open_stream(config, train, seed)
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from error

    def class_names(self, name: str) -> list[str]:
        """
        The label space of a training set; for one without labels, that of the IID test set.

        Raises:
            `DataError`: a class has no image, so it could not be learned.
        """
        if not self.config(name).is_labeled:
            return self.images(self.recipe.evaluation.iid).class_names
        if self.config(name).streaming:
            if name not in self._streamed_classes:
                self._streamed_classes[name] = self._stream(name, self.config(name), train=False).class_names
            return self._streamed_classes[name]
        images = self.images(name)
        present = set(images.labels.tolist())
        absent = [class_name for label, class_name in enumerate(images.class_names) if label not in present]
        if absent:
            raise DataError(
                f"data.{name}: the classes {absent} have no training images. Add some, or remove the classes."
            )
        return images.class_names

    def training_set(self, name: str, seed: int) -> ImageDataset | StreamedImages:
        """A training set with the augmentation of its recipe."""
        if self.config(name).streaming:
            return self._stream(name, self.config(name), train=True, seed=seed)
        return ImageDataset(self.images(name), self.config(name), train=True, seed=seed)

    def test_set(self, name: str, like: str, class_names: Sequence[str]) -> ImageDataset | StreamedImages:
        """
        A test set for a model trained on the data set `like`: its pixels are prepared as for that set, and its labels
        are mapped by name to the model's classes.

        Raises:
            `DataError`: it has a class that the model does not know.
        """
        model = self.config(like)
        pixels = {field: getattr(model, field) for field in ("image_size", "mean", "std", "resample", "center_crop")}
        config = self.config(name).model_copy(update=pixels)
        data = self._stream(name, config, train=False) if config.streaming else self.images(name)
        try:
            data = data.relabel(class_names)
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from error
        return data if config.streaming else ImageDataset(data, config, train=False)

    def plain_set(self, name: str, most: int) -> ImageDataset | list[Sample]:
        """
        Up to `most` images of a training set without augmentation: spread evenly over it, or the first of a stream.
        """
        if self.config(name).streaming:
            return list(islice(self._stream(name, self.config(name), train=False), most))
        images = self.images(name)
        chosen = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(np.int64)
        return ImageDataset(images.select(chosen), self.config(name), train=False)

    def shares_labels(self, name: str, class_names: Sequence[str]) -> bool:
        """Whether every class of the data set is one of `class_names`."""
        own = self.class_names(name) if self.config(name).streaming else self.images(name).class_names
        return set(own) <= set(class_names)


def describe_set(name: str, images: int | None, class_names: Sequence[str]) -> str:
    """Describe a data set in one line: number of images (`None`: not published) and classes."""
    if not class_names:
        return f"data.{name}: {images:,} images without labels"
    classes = ", ".join([*class_names[:3], *(["…"] if len(class_names) > 3 else [])])
    count = "an unknown number of" if images is None else f"{images:,}"
    return f"data.{name}: {count} images of {len(class_names):,} classes ({classes})"
