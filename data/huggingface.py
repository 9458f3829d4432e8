"""Images of the `datasets` library: a Hub id, a local path, or a folder written by `save_to_disk`."""

import os
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from m2mkd.data.config import DataConfig
from m2mkd.data.decoding import decode_image
from m2mkd.data.labeled_images import LabeledImages, LazyImages
from m2mkd.errors import DataError


if TYPE_CHECKING:
    import datasets


def _decode_row(encoded: "datasets.Dataset", column: str, names: list[str], index: int) -> Image.Image:
    """Decode an image of a column of `{"bytes": bytes | None, "path": str | None}` here, so that an error names it."""
    row = encoded[index][column]
    source = row and (row["bytes"] or row["path"])
    if not source:
        raise DataError(f"{names[index]} has no image in column {column!r}: remove the row")
    return decode_image(source, names[index])


def _open(config: DataConfig) -> "datasets.Dataset | datasets.DatasetDict":
    """Open the source with `datasets`, which also selects the split if it can."""
    import datasets

    saved = [os.path.join(config.source, name) for name in ("state.json", "dataset_dict.json")]
    try:
        if any(os.path.isfile(path) for path in saved):
            return datasets.load_from_disk(config.source)
        return datasets.load_dataset(config.source, config.config_name, split=config.split)
    except (
        Exception
    ) as error:  # builders raise almost any type: no network, no such id, unknown split or configuration
        raise DataError(
            f"datasets cannot open source={config.source!r}, config_name={config.config_name!r}, "
            f"split={config.split!r} ({type(error).__name__}: {error}): check the id, the split and the network, or "
            "use 'imagefolder:PATH', 'mnist5k', 'uci_digits', 'glyphs' or a folder written by save_to_disk"
        ) from error


def _one_split(found: "datasets.Dataset | datasets.DatasetDict", config: DataConfig) -> "datasets.Dataset":
    """The split that the configuration names, or the data set itself if it has no splits."""
    import datasets

    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            problem = (
                f"no split of {config.source} is chosen"
                if config.split is None
                else f"{config.source} has no split {config.split!r}"
            )
            is_plain = os.path.isdir(config.source) and not os.path.isfile(
                os.path.join(config.source, "dataset_dict.json")
            )
            folder = f", or give 'imagefolder:{config.source}' if its sub-folders are classes" if is_plain else ""
            raise DataError(f"{problem}: set split to one of {sorted(found)}{folder}")
        return found[config.split]
    # load_dataset has already applied `split` (also "train[:10%]"); load_from_disk takes no split.
    saved = os.path.isfile(os.path.join(config.source, "state.json"))
    if saved and config.split is not None and str(found.split) != config.split:
        raise DataError(f"{config.source} is a single data set without a split {config.split!r}: leave split out")
    return found


def _labels(dataset: "datasets.Dataset", config: DataConfig) -> tuple[np.ndarray, list[str]]:
    """int64 labels (n,) and class names from a column of ClassLabel, integers or strings."""
    import datasets

    column = config.label_column
    feature = dataset.features[column]
    values = dataset.select_columns(column).with_format("arrow")[:][column]
    if values.null_count:
        raise DataError(f"{values.null_count} rows of {config.source} have no {column!r}: remove them")
    if isinstance(feature, datasets.ClassLabel):
        return values.to_numpy().astype(np.int64), list(feature.names)
    kind = getattr(feature, "dtype", "")
    if kind in ("string", "large_string"):
        names, labels = np.unique(np.array(values.to_pylist(), dtype=object), return_inverse=True)
        return labels.astype(np.int64), names.tolist()
    if kind.startswith(("int", "uint")):
        labels = values.to_numpy().astype(np.int64)
        return labels, [str(label) for label in range(int(labels.max()) + 1)]
    raise DataError(
        f"label column {column!r} of {config.source} is {feature}: it must be ClassLabel, integer or string"
    )


def load_from_datasets(config: DataConfig) -> LabeledImages:
    """One split of a `datasets` source; images stay encoded until they are read.

    Class names are those of a ClassLabel column, "0", "1", … for integers, and the sorted values for strings.

    Raises:
        DataError: the source cannot be opened, the split or a column is missing, there are no rows, or a column does
            not have the type of an image or a label.
    """
    import datasets

    dataset = _one_split(_open(config), config)
    missing = [name for name in (config.image_column, config.label_column) if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"{config.source} has no column {missing[0]!r}, its columns are {dataset.column_names}: set image_column "
            "and label_column"
        )
    if not len(dataset):
        raise DataError(f"{config.source} has no rows in split {config.split!r}: choose another split")
    feature = dataset.features[config.image_column]
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", "") not in ("string", "binary"):
        raise DataError(f"image column {config.image_column!r} of {config.source} is {feature}: it must be an Image")
    labels, class_names = _labels(dataset, config)
    encoded = dataset.select_columns(config.image_column).cast_column(
        config.image_column, datasets.Image(decode=False)
    )
    where = config.source if config.split is None else f"{config.source}:{config.split}"
    names = [f"{where}[{index}]" for index in range(len(dataset))]
    decode = partial(_decode_row, encoded, config.image_column, names)
    return LabeledImages(LazyImages(range(len(dataset)), decode), labels, class_names, names)
