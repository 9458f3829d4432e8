"""The data sets that a recipe can select by a short name."""

from dataclasses import dataclass

from m2mkd.data.config import DataConfig
from m2mkd.data.huggingface import load_from_datasets
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.labeled_images import LabeledImages
from m2mkd.data.layouts import load_layout, squashed
from m2mkd.errors import DataError


@dataclass(frozen=True)
class KnownSet:
    """A published set.

    Attributes:
        hub: id on the Hub.
        columns: names of the image and label columns on the Hub.
        splits: our name of each split, its name on the Hub, and its number of images (`None`: not published).
        marks: for a set of ImageNet classes, the marks that select its classes (see `imagenet_classes`).
        num_classes: for any other set, how many classes it has.
    """

    hub: str
    columns: tuple[str, str]
    splits: dict[str, tuple[str, int | None]]
    marks: tuple[str, ...] | None = None
    num_classes: int = 0

    @property
    def classes(self) -> list[str]:
        """The classes without the images: WordNet ids, or numbers where the names come with the images."""
        return imagenet_classes(*self.marks) if self.marks is not None else list(map(str, range(self.num_classes)))


KNOWN_SETS = {
    "imagenet-1k": KnownSet(
        "ILSVRC/imagenet-1k",
        ("image", "label"),
        {"train": ("train", 1_281_167), "val": ("validation", 50_000)},
        (),
    ),
    "imagenet-r": KnownSet("axiong/imagenet-r", ("image", "wnid"), {"test": ("test", 30_000)}, ("r",)),
    "tiny-imagenet": KnownSet(
        "zh-plus/tiny-imagenet", ("image", "label"), {"train": ("train", 100_000), "val": ("valid", 10_000)}, ("tiny",)
    ),
    # made from ImageNet-R
    "tiny-imagenet-r": KnownSet("axiong/imagenet-r", ("image", "wnid"), {"test": ("test", None)}, ("tiny", "r")),
    "cifar10": KnownSet(
        "uoft-cs/cifar10",
        ("img", "label"),
        {"train": ("train", 50_000), "test": ("test", 10_000)},
        num_classes=10,
    ),
    "cifar100": KnownSet(
        "uoft-cs/cifar100",
        ("img", "fine_label"),
        {"train": ("train", 50_000), "test": ("test", 10_000)},
        num_classes=100,
    ),
    "cub-200": KnownSet(
        "bentrevett/caltech-ucsd-birds-200-2011",
        ("image", "label"),
        {"train": ("train", 5_994), "test": ("test", 5_794)},
        num_classes=200,
    ),
}
# Of the sets that come with Python packages.
PACKAGED_SPLITS = {
    "mnist5k": ("train", "test"),
    "uci_digits": ("test",),
    "glyphs": ("train", "handwriting", "test"),
}


def known_set(source: str) -> KnownSet | None:
    """The published set that a source names, with or without the path of a local copy."""
    return KNOWN_SETS.get(source.partition(":")[0])


def splits_of(source: str) -> tuple[str, ...]:
    """Splits of a published or packaged set, to train on first and to test on last; none of any other source."""
    known = known_set(source)
    return tuple(known.splits) if known is not None else PACKAGED_SPLITS.get(source, ())


def published_split(config: DataConfig) -> tuple[str, str, int | None]:
    """The split of a published set that a configuration asks for: its name, that on the Hub, its number of images.

    Raises:
        DataError: the set has no such split.
    """
    name = config.source.partition(":")[0]
    splits = KNOWN_SETS[name].splits
    split = config.split or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise DataError(f"{name} has no split {config.split!r}: set split to {' or '.join(map(repr, splits))}")
    return split, *splits[split]


def load_known_set(config: DataConfig) -> LabeledImages:
    """Load a set by its short name, from the Hub (`NAME`) or from a local copy (`NAME:PATH`).

    The classes of the ImageNet sets are WordNet ids in ascending order, regardless of where the images come from.

    Raises:
        DataError: the split, the folder, a file or images are missing, or the Hub cannot be reached.
    """
    name, _, path = config.source.partition(":")
    split, hub_split, count = published_split(config)
    if not path:
        return _from_hub(name, KNOWN_SETS[name], config, hub_split)
    data = load_layout(name, path, split, config.partial)
    if count is not None and len(data) < count and not config.partial:
        raise DataError(
            f"{name}: split {split!r} in {path} has {len(data):,} images, but the published set has {count:,}: unpack "
            "it again, or set partial: true to use the images that are present"
        )
    return data


def _from_hub(name: str, known: KnownSet, config: DataConfig, split: str) -> LabeledImages:
    image_column, label_column = known.columns
    own = {"source": known.hub, "image_column": image_column, "label_column": label_column, "split": split}
    try:
        data = load_from_datasets(config.model_copy(update=own))
    except DataError as error:
        raise DataError(f"{error}; or use a local copy, '{name}:PATH'") from error
    return data if known.marks is None else _with_wnids(name, data, known.classes)


def _with_wnids(name: str, data: LabeledImages, classes: list[str]) -> LabeledImages:
    """Name the classes by WordNet ids and keep only those in `classes`."""
    names = data.class_names
    if not set(imagenet_classes()).issuperset(names):
        # The class names are words instead of ids; the labels are in the order of the ids.
        if len(names) != len(classes):
            raise DataError(
                f"{name} on the Hub has {len(names)} classes instead of {len(classes)}: use a local copy, "
                f"'{name}:PATH'"
            )
        return LabeledImages(data.images, data.labels, classes, data.names)
    part = data.of_classes(classes)
    return squashed(part) if name == "tiny-imagenet-r" else part
