"""Stratified parts of a set of labels, always the same for the same labels."""

import numpy as np

from m2mkd.data.errors import DataError


# Not the seed of a run: two runs must never test on each other's training images.
HOLDOUT_SEED = 20402


def _shuffled(members: np.ndarray, seed: int, label: int) -> np.ndarray:
    """`members` in an order that depends on (seed, label) alone, so that classes do not move each other's samples."""
    # RandomState and not Generator: numpy freezes its stream for ever, so the split outlives numpy's versions.
    return members[np.random.RandomState([seed, label]).permutation(len(members))]


def holdout_indices(labels: np.ndarray, class_names: list[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training part and of the held-out part, both in rising order.

    Args:
        labels: int64 array (n,).
        class_names: names for the errors.
        share: of each class that is held out, in (0, 1): rounded to whole samples, at least one on either side.

    Raises:
        DataError: a class too small to leave a sample on either side.
    """
    held = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        if count < 1:
            raise DataError(
                f"class {name!r} has {len(members)} images: too few to train on some and hold out others "
                "(holdout); add images or remove the class"
            )
        held.append(_shuffled(members, HOLDOUT_SEED, label)[:count])
    test = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), test), test


def sample_per_class(labels: np.ndarray, class_names: list[str], count: int, seed: int) -> np.ndarray:
    """Positions (count * classes,) of `count` samples of each class, in rising order.

    A larger `count` with the same seed contains the smaller one.

    Raises:
        DataError: a class has fewer than `count` samples.
    """
    chosen = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise DataError(
                f"class {name!r} has {len(members)} images, samples_per_class asks for {count}: lower it or add images"
            )
        chosen.append(_shuffled(members, seed, label)[:count])
    return np.sort(np.concatenate(chosen))
