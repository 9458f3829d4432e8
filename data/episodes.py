"""Few-shot episodes: some classes, with a few images of each to learn from and other images to test on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from m2mkd.data.labeled_images import LabeledImages
from m2mkd.errors import DataError


VALIDATION_SHOTS = 3  # images to test on per image to learn from (README of the official code)


@dataclass(frozen=True)
class Episode:
    """One task of `ways` classes.

    Attributes:
        classes: labels of the classes in the whole set, ascending, int64 (ways,). The task's own labels are positions
            in this array.
        train: positions in the training images, int64 (ways * shots,), class by class.
        validation: positions in the validation images, int64 (ways * 3 * shots,), class by class.
    """

    classes: np.ndarray
    train: np.ndarray
    validation: np.ndarray

    def own_labels(self, positions: np.ndarray) -> np.ndarray:
        """The task's own labels of `train` or `validation`, of the same shape."""
        return np.repeat(np.arange(len(self.classes)), len(positions) // len(self.classes))


def draw_episodes(
    train: LabeledImages, validation: LabeledImages | None, ways: int, shots: int, episodes: int, seed: int
) -> Iterator[Episode]:
    """Draw episodes with disjoint training and validation images of the same classes.

    (The official loader of CIFAR-100 draws both from the training split with one seed, so at 5 shots every training
    image is also a test image.)

    Args:
        train: images to learn from.
        validation: images to test on, of the same classes; `None`: other images of `train`.
        ways: number of classes per episode, at least 2.
        shots: number of images per class to learn from; three times as many are used for testing.
        episodes: number of episodes; episode i does not depend on it.
        seed: seed of all episodes.

    Raises:
        DataError: the two sets share an image or differ in their classes, or too few classes have enough images.
    """
    if validation is not None:
        both = set(train.names) & set(validation.names)
        if both:
            raise DataError(f"{len(both)} images are in both sets, for example {min(both)}: choose two splits")
        if train.class_names != validation.class_names:
            raise DataError("training and validation images have different classes: choose two splits of the same set")
    pools = [
        [np.flatnonzero(data.labels == label) for label in range(len(data.class_names))]
        for data in (train, train if validation is None else validation)
    ]
    # how many images of each class an episode can learn from, so that there are enough others to test on
    if validation is None:
        most = np.array([len(own) // (1 + VALIDATION_SHOTS) for own in pools[0]])
    else:
        most = np.array([min(len(own), len(others) // VALIDATION_SHOTS) for own, others in zip(*pools, strict=True)])
    eligible = np.flatnonzero(most >= shots)
    if len(eligible) < ways:
        raise DataError(_too_few(most, ways, shots, len(eligible)))
    for number in range(episodes):
        rng = np.random.default_rng((seed, number))
        classes = np.sort(rng.choice(eligible, ways, replace=False))
        learnt, tested = [], []
        for label in classes.tolist():
            own = rng.permutation(pools[0][label])
            learnt.append(own[:shots])
            # without a second set, the next images of the same order
            rest = own[shots:] if validation is None else rng.permutation(pools[1][label])
            tested.append(rest[: VALIDATION_SHOTS * shots])
        yield Episode(classes, np.concatenate(learnt), np.concatenate(tested))


def _too_few(most: np.ndarray, ways: int, shots: int, eligible: int) -> str:
    if len(most) < ways:
        return f"ways is {ways}, but there are only {len(most)} classes: set ways to {len(most)} or fewer"
    fewer = int(np.sort(most)[::-1][ways - 1])
    ways_out = [f"set shots to {fewer} or fewer"] if fewer else []
    ways_out += [f"set ways to {eligible} or fewer"] if eligible > 1 else []
    return (
        f"shots is {shots}, so each class of an episode needs {shots} images to learn from and "
        f"{VALIDATION_SHOTS * shots} others to test on. {eligible} of {len(most)} classes have as many, but ways is "
        f"{ways}: {' or '.join(ways_out) or 'add images'}"
    )
