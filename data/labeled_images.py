"""Images with their labels, regardless of their source."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from PIL import Image

from m2mkd.errors import DataError


class LazyImages(Sequence[Image.Image]):
    """Images that are read at access and never kept in memory, because there may be millions.

    Args:
        items: one item per image, for example its path.
        read: makes the image of an item; it must be picklable, because workers get copies.
    """

    def __init__(self, items: Sequence[Any] | np.ndarray, read: Callable[[Any], Image.Image]) -> None:
        self.items = items
        self.read = read

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyImages": ...
    def __getitem__(self, index: int | slice) -> "Image.Image | LazyImages":
        found = self.items[index]
        return LazyImages(found, self.read) if isinstance(index, slice) else self.read(found)


@dataclass(frozen=True)
class LabeledImages:
    """A classification set of n images.

    Attributes:
        images: `images[i]` is a `PIL.Image` of mode RGB and any size; it may be decoded at access.
        labels: int64 array (n,) with values in [0, len(class_names)).
        class_names: name of each class.
        names: name of each sample in an error: its file path, or for example `mnist5k[17]`.
        possible: labels that a sample of this set can have, ascending, if the set has only some of the classes in
            `class_names` (a set of 62 classes for a model of 200); `None`: all.

    Raises:
        DataError: the lengths differ, a label is out of range, or two classes have the same name.
    """

    images: Sequence[Image.Image]
    labels: np.ndarray
    class_names: list[str]
    names: list[str]
    possible: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.labels) == len(self.names):
            raise DataError(
                f"{len(self.images)} images, {len(self.labels)} labels and {len(self.names)} names: give one of each "
                "for every sample"
            )
        if self.labels.dtype != np.int64:
            raise DataError(f"labels are {self.labels.dtype}: convert them to int64")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            wrong = int(np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))[0])
            raise DataError(
                f"{self.names[wrong]} has label {self.labels[wrong]}, but there are {len(self.class_names)} classes: "
                "use a labeled split"
            )
        repeated = [name for name, count in Counter(self.class_names).items() if count > 1]
        if repeated:
            raise DataError(f"class names must be unique, but these are repeated: {', '.join(repeated)}")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Iterable[int] | np.ndarray) -> "LabeledImages":
        """The samples at `indices` (any integers in [0, n), in that order), with the same classes.

        Raises:
            IndexError: an index outside [0, n).
        """
        chosen = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(
                f"indices {chosen.min()}..{chosen.max()} are out of range for {len(self)} samples: use "
                f"0..{len(self) - 1}"
            )
        names = [self.names[index] for index in chosen.tolist()]
        images = LazyImages(chosen, self.images.__getitem__)
        return LabeledImages(images, self.labels[chosen], self.class_names, names, self.possible)

    def of_classes(self, class_names: Sequence[str]) -> "LabeledImages":
        """The samples of some classes, relabeled to only these classes.

        Args:
            class_names: names of the classes in the order of their labels; a class that this set lacks has no samples.
        """
        known = set(class_names)
        wanted = np.array([name in known for name in self.class_names], dtype=bool)
        return self.select(np.flatnonzero(wanted[self.labels])).relabel(class_names)

    def relabel(self, class_names: Sequence[str]) -> "LabeledImages":
        """The same samples over another list of classes (for example, those of a model), matched by name.

        Args:
            class_names: names of the target classes, in the order of their labels.

        Raises:
            DataError: a class that has samples here is not in `class_names`.
        """
        target = {name: label for label, name in enumerate(class_names)}
        present = [self.class_names[label] for label in np.unique(self.labels)]
        missing = [name for name in present if name not in target]
        if missing:
            raise DataError(
                f"the model was trained without the classes {', '.join(missing)} ({len(missing)} of the "
                f"{len(present)} of this data): leave their samples out, or train on data that has these classes"
            )
        # A class without samples may be absent from the target; its entry in the table is never read.
        table = np.array([target.get(name, -1) for name in self.class_names], dtype=np.int64)
        reachable = table if self.possible is None else table[self.possible]
        possible = np.sort(reachable[reachable >= 0])
        return LabeledImages(
            self.images,
            table[self.labels],
            list(class_names),
            self.names,
            None if len(possible) == len(class_names) else possible,
        )


def class_counts(data: LabeledImages) -> dict[str, int]:
    """Number of samples of each class name, classes without samples included, in the order of the labels."""
    counts = np.bincount(data.labels, minlength=len(data.class_names)).tolist()
    return dict(zip(data.class_names, counts, strict=True))
