"""Stratified splits of a set of labels, always the same for the same labels."""

import numpy as np

from m2mkd.errors import DataError


# Independent of the seed of a run, so that two runs never test on each other's training images.
HOLDOUT_SEED = 20402


def _shuffled(members: np.ndarray, seed: int, label: int) -> np.ndarray:
    """Shuffle `members`. The order depends only on (seed, label), so one class does not affect another."""
    # RandomState instead of Generator: its stream is frozen, so the split is the same in every version of numpy.
    return members[np.random.RandomState([seed, label]).permutation(len(members))]


def holdout_indices(labels: np.ndarray, class_names: list[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training part and of the held-out part, both in ascending order.

    Args:
        labels: int64 array (n,).
        class_names: names of the classes, for errors.
        share: fraction of each class that is held out, in (0, 1). It is rounded to whole samples, with at least one
            sample in each part.

    Raises:
        DataError: a class has too few samples for both parts.
    """
    held = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        if count < 1:
            raise DataError(
                f"class {name!r} has {len(members)} images, but holdout needs at least 2 per class: add images or "
                "remove the class"
            )
        held.append(_shuffled(members, HOLDOUT_SEED, label)[:count])
    test = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), test), test


def sample_per_class(labels: np.ndarray, class_names: list[str], count: int, seed: int) -> np.ndarray:
    """Positions (count * classes,) of `count` samples of each class, in ascending order.

    With the same seed, the samples of a larger `count` contain those of a smaller one.

    Raises:
        DataError: a class has fewer than `count` samples.
    """
    chosen = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise DataError(
                f"class {name!r} has {len(members)} images, but samples_per_class asks for {count}: lower it or add "
                "images"
            )
        chosen.append(_shuffled(members, seed, label)[:count])
    return np.sort(np.concatenate(chosen))
