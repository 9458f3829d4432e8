"""The Python files of CIFAR-10 and CIFAR-100, read without executing code that a pickle may contain."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2mkd.data.labeled_images import LabeledImages, LazyImages
from m2mkd.errors import DataError


SIDE = 32  # pixels
# Set name -> the files of each split, the key of the labels, the file and the key of the class names.
FILES: dict[str, tuple[dict[str, list[str]], bytes, str, bytes]] = {
    "cifar10": (
        {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
        b"labels",
        "batches.meta",
        b"label_names",
    ),
    "cifar100": (
        {"train": ["train"], "test": ["test"]},
        b"fine_labels",
        "meta",
        b"fine_label_names",
    ),
}
# All names that such a file needs for its arrays of numbers, written by Python 2 or 3 and by numpy 1 or 2.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _NumbersOnly(pickle.Unpickler):
    """A restricted unpickler that reads lists, dictionaries, strings and arrays of numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it tries to load {module}.{name}, which a CIFAR file never needs")
        return super().find_class(module, name)


def _read(path: Path, keys: tuple[bytes, ...]) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            content = _NumbersOnly(file, encoding="bytes").load()
        return {key: content[key] for key in keys}
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: unpack the Python version of the set again") from error
    except Exception as error:  # a damaged or foreign pickle raises almost any type
        raise DataError(
            f"{path} is not a Python file of CIFAR ({type(error).__name__}: {error}): unpack the Python version again"
        ) from error


def load_cifar(name: str, folder: Path, split: str) -> LabeledImages:
    """CIFAR-10 or CIFAR-100 (its 100 fine classes) as published, 32 x 32 pixels.

    Args:
        name: `"cifar10"` or `"cifar100"`.
        folder: folder with the batches, `cifar-10-batches-py` or `cifar-100-python`.
        split: `"train"` or `"test"`.

    Raises:
        DataError: a file is missing, damaged, or contains anything other than arrays, lists and text.
    """
    files, label_key, meta, names_key = FILES[name]
    pixels, labels = [], []
    for file in files[split]:
        content = _read(folder / file, (b"data", label_key))
        data = np.asarray(content[b"data"])
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape != (len(content[label_key]), 3 * SIDE**2):
            raise DataError(
                f"{folder / file} has data {data.dtype} {data.shape} and {len(content[label_key])} labels, but each "
                f"image should be a row of {3 * SIDE**2} bytes with one label: unpack it again"
            )
        pixels.append(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        labels.extend(content[label_key])
    class_names = [each.decode() for each in _read(folder / meta, (names_key,))[names_key]]
    names = [f"{name}:{split}[{index}]" for index in range(len(labels))]
    return LabeledImages(
        LazyImages(np.ascontiguousarray(np.concatenate(pixels)), Image.fromarray),
        np.array(labels, dtype=np.int64),
        class_names,
        names,
    )
