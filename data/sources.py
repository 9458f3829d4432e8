"""Loading of labeled images from the `source` of a configuration."""

from m2mkd.data.config import IMAGEFOLDER_PREFIX, UNLABELED_PREFIX, DataConfig
from m2mkd.data.corruption import without_corrupt
from m2mkd.data.digits import load_mnist5k, load_uci_digits
from m2mkd.data.glyphs import load_glyphs
from m2mkd.data.huggingface import load_from_datasets
from m2mkd.data.imagefolder import load_imagefolder, load_unlabeled
from m2mkd.data.known_sets import known_set, load_known_set, splits_of
from m2mkd.data.labeled_images import LabeledImages
from m2mkd.data.splits import holdout_indices, sample_per_class
from m2mkd.errors import DataError


MNIST5K_HOLDOUT = 0.2  # 100 of the 500 images of each class


def _check_split(config: DataConfig, allowed: tuple[str | None, ...]) -> None:
    if config.split not in allowed:
        raise DataError(
            f"source {config.source!r} has no split {config.split!r}: use {' or '.join(map(repr, allowed))}"
        )


def _held_out(data: LabeledImages, config: DataConfig, share: float) -> LabeledImages:
    """The training or the held-out part of a source that has no splits of its own."""
    # Without a split, both parts would be used: the run would train on its own test images.
    _check_split(config, ("train", "test"))
    train, test = holdout_indices(data.labels, data.class_names, share)
    return data.select(train if config.split == "train" else test)


def _load_split(config: DataConfig) -> LabeledImages:
    if config.source == "mnist5k":
        return _held_out(load_mnist5k(), config, MNIST5K_HOLDOUT)
    if config.source == "uci_digits":
        _check_split(config, (*splits_of(config.source), None))
        return load_uci_digits()
    if config.source == "glyphs":
        _check_split(config, splits_of(config.source))
        return load_glyphs(config.split)
    if not config.is_labeled:
        return load_unlabeled(config.source.removeprefix(UNLABELED_PREFIX))
    if config.source.startswith(IMAGEFOLDER_PREFIX):
        data = load_imagefolder(config.source.removeprefix(IMAGEFOLDER_PREFIX))
        if config.holdout:
            return _held_out(data, config, config.holdout)
        if config.split is not None:
            raise DataError(
                f"{config.source} has no split {config.split!r}: leave split out, or set holdout to get 'train' and "
                "'test'"
            )
        return data
    if known_set(config.source) is not None:
        return load_known_set(config)
    return load_from_datasets(config)


def load_images(config: DataConfig) -> LabeledImages:
    """The labeled images that a configuration describes, before any resize or augmentation.

    The same configuration gives the same samples in the same order, in every run and on every machine.

    Raises:
        DataError: the source, its split, a class or a column is missing (see the function of each source), or more
            images are corrupt than `max_corrupt_share` allows.
        ImportError: the package of a packaged set is not installed.
    """
    data = _load_split(config)
    if config.max_corrupt_share:
        data = without_corrupt(data, config.max_corrupt_share)
    if config.samples_per_class is None:
        return data
    return data.select(sample_per_class(data.labels, data.class_names, config.samples_per_class, config.subset_seed))
