"""Loading of local copies of published data sets, in the folder layout of their archives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from m2mkd.data.cifar import load_cifar
from m2mkd.data.decoding import decode_image
from m2mkd.data.imagefolder import class_files, image_extensions, is_junk
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.labeled_images import LabeledImages, LazyImages
from m2mkd.errors import DataError


ARCHIVES = (".tar", ".gz", ".tgz", ".zip")
TINY_SIDE = 64  # pixels
NAMED_AT_MOST = 5  # names that an error lists


def _some(names: Sequence[str]) -> str:
    """The first names of a list, for an error."""
    rest = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + rest


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise DataError(f"there is no folder {path}, {what}")
    return path


def _text(path: Path) -> list[list[str]]:
    """The words of each line of a text file."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _by_class(labels: dict[str, list[str]]) -> LabeledImages:
    """Build a set of labeled files from the paths of each class, in the order of the classes."""
    paths = [path for class_paths in labels.values() for path in class_paths]
    numbers = np.repeat(np.arange(len(labels), dtype=np.int64), [len(each) for each in labels.values()])
    return LabeledImages(LazyImages(paths, decode_image), numbers, list(labels), paths)


def _class_folders(root: Path, classes: Sequence[str], partial: bool, inner: str = "") -> LabeledImages:
    """Load one folder per class, with its images below `inner`. The labels follow `classes`, without absent folders.

    Raises:
        DataError: archives are still packed, images are outside the class folders, class folders are missing, or a
            folder is not a class.
    """
    folder = _folder(root, "which should contain one folder per class")
    entries = [entry for entry in sorted(folder.iterdir()) if not is_junk(entry.name)]
    packed = [entry.name for entry in entries if entry.name.endswith(ARCHIVES)]
    if packed:
        raise DataError(f"{root} contains archives ({_some(packed)}): unpack each into a folder of the same name")
    extensions = image_extensions()
    loose = [entry.name for entry in entries if entry.is_file() and entry.suffix.lower() in extensions]
    if loose:
        raise DataError(
            f"{root} contains {len(loose)} images outside the class folders ({_some(loose)}): move each into the "
            "folder of its class"
        )
    present = {entry.name for entry in entries if entry.is_dir()}
    unknown = sorted(present - set(classes) - set(imagenet_classes()))
    if unknown:
        raise DataError(f"{root} contains folders that are not a class of the set ({_some(unknown)}): move them away")
    missing = [name for name in classes if name not in present]
    if len(missing) == len(classes) or (missing and not partial):
        raise DataError(
            f"{root} lacks {len(missing)} of the {len(classes)} class folders ({_some(missing)}): unpack the rest, or "
            "set partial: true to use the classes that are present"
        )
    found = [name for name in classes if name in present]
    return _by_class({name: class_files(str(root / name / inner), extensions) for name in found})


def _imagenet(root: Path, split: str, partial: bool) -> LabeledImages:
    return _class_folders(root / split, imagenet_classes(), partial)


def _imagenet_r(root: Path, split: str, partial: bool) -> LabeledImages:
    return _class_folders(root, imagenet_classes("r"), partial)


def _tiny_imagenet(root: Path, split: str, partial: bool) -> LabeledImages:
    classes = imagenet_classes("tiny")
    if split == "train":
        return _class_folders(root / "train", classes, partial, inner="images")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file() and any((root / "val").glob("n*")):
        # sorted into class folders, as the official code expects
        nested = next((root / "val").glob("n*/images"), None)
        return _class_folders(root / "val", classes, partial, inner="images" if nested else "")
    found: dict[str, list[str]] = {name: [] for name in classes}
    for file, wnid, *_ in _text(annotations):
        if wnid not in found:
            raise DataError(f"{annotations} gives {file} the class {wnid}, which is not a class of Tiny-ImageNet")
        found[wnid].append(str(root / "val" / "images" / file))
    folder = _folder(root / "val" / "images", "which should contain the validation images")
    here = set(_names(folder))
    absent = sorted({Path(path).name for paths in found.values() for path in paths} - here)
    if absent and not partial:
        raise DataError(f"{folder} lacks {len(absent)} of the images of {annotations.name} ({_some(absent)})")
    found = {name: [path for path in paths if Path(path).name in here] for name, paths in found.items()}
    return _by_class({name: paths for name, paths in found.items() if paths or not partial})


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not is_junk(entry.name))


def _tiny_imagenet_r(root: Path, split: str, partial: bool) -> LabeledImages:
    """Load the published copy (62 folders of 64 x 64 pixels), or make the same set from a copy of ImageNet-R."""
    data = _class_folders(root, imagenet_classes("tiny", "r"), partial)
    is_imagenet_r = any((root / name).is_dir() for name in set(imagenet_classes("r")) - set(imagenet_classes("tiny")))
    return squashed(data) if is_imagenet_r else data


def squashed(data: LabeledImages) -> LabeledImages:
    """
    Resize images of ImageNet-R to 64 x 64 pixels regardless of their aspect ratio, with Pillow's default filter
    (bicubic), as in Tiny-ImageNet-R.
    """
    squash = functools.partial(Image.Image.resize, size=(TINY_SIDE, TINY_SIDE))
    return dataclasses.replace(data, images=LazyImages(data.images, squash))


def _cub(root: Path, split: str, partial: bool) -> LabeledImages:
    files = {number: name for number, name in _text(root / "images.txt")}
    labels = {number: int(label) - 1 for number, label in _text(root / "image_class_labels.txt")}
    is_train = {number: flag == "1" for number, flag in _text(root / "train_test_split.txt")}
    classes = [name for _, name in _text(root / "classes.txt")]
    if not files.keys() == labels.keys() == is_train.keys():
        raise DataError(
            f"{root}: images.txt, image_class_labels.txt and train_test_split.txt list {len(files)}, {len(labels)} "
            f"and {len(is_train)} images, but they should list the same images"
        )
    chosen = [number for number in files if is_train[number] == (split == "train")]
    images = _folder(root / "images", "which should contain the images")
    here = {f"{name}/{file}" for name in _names(images) for file in _names(images / name)}
    absent = [files[number] for number in chosen if files[number] not in here]
    if absent and not partial:
        raise DataError(f"{images} lacks {len(absent)} of the images of images.txt ({_some(absent)})")
    chosen = [number for number in chosen if files[number] in here]
    paths = [str(images / files[number]) for number in chosen]
    numbers = np.array([labels[number] for number in chosen], dtype=np.int64)
    return LabeledImages(LazyImages(paths, decode_image), numbers, classes, paths)


def _cifar(name: str) -> "Loader":
    """Return a loader of the published Python files, or of images in {train,test}/CLASS/."""

    def load(root: Path, split: str, partial: bool) -> LabeledImages:
        if (root / split).is_dir():  # the classes of both sets are in alphabetical order
            return _class_folders(root / split, _names(root / split), partial)
        return load_cifar(name, root, split)

    return load


# (folder of the set, split, whether a partial copy is accepted) -> images
Loader = Callable[[Path, str, bool], LabeledImages]
# Name of each set -> the folder that its archive unpacks to, the expected contents of this folder, and the loader.
LAYOUTS: dict[str, tuple[str, str, Loader]] = {
    "imagenet-1k": ("imagenet", "{train,val}/nXXXXXXXX/*.JPEG", _imagenet),
    "imagenet-r": ("imagenet-r", "nXXXXXXXX/*.jpg", _imagenet_r),
    "tiny-imagenet": (
        "tiny-imagenet-200",
        "train/nXXXXXXXX/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt",
        _tiny_imagenet,
    ),
    "tiny-imagenet-r": ("tiny-imagenet-r", "nXXXXXXXX/*.jpg (or a copy of ImageNet-R)", _tiny_imagenet_r),
    "cifar10": (
        "cifar-10-batches-py",
        "data_batch_1 to 5, test_batch, batches.meta; or {train,test}/CLASS/*.png",
        _cifar("cifar10"),
    ),
    "cifar100": ("cifar-100-python", "train, test, meta; or {train,test}/CLASS/*.png", _cifar("cifar100")),
    "cub-200": (
        "CUB_200_2011",
        "images/NNN.Name/*.jpg, images.txt, image_class_labels.txt, train_test_split.txt, classes.txt",
        _cub,
    ),
}


def _write_imagenet(root: Path, classes: Sequence[str], per_class: int, picture: "Picture") -> None:
    for number, wnid in enumerate(classes):
        for split in ("train", "val"):
            for index in range(per_class):
                picture(root / split / wnid / f"{wnid}_{index}.JPEG", number)


def _write_renditions(root: Path, classes: Sequence[str], per_class: int, picture: "Picture") -> None:
    for number, wnid in enumerate(classes):
        for index in range(per_class):
            picture(root / wnid / f"art_{index}.jpg", number)


def _write_tiny_imagenet(root: Path, classes: Sequence[str], per_class: int, picture: "Picture") -> None:
    lines: list[str] = []
    for number, wnid in enumerate(classes):
        for index in range(per_class):
            picture(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", number)
            name = f"val_{len(lines)}.JPEG"
            picture(root / "val" / "images" / name, number)
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")


# (path, number of the class): writes an image, and the folders above it
Picture = Callable[[Path, int], None]
# (folder of the set, its classes, images of each, what writes one): write every split of a set in small
WRITERS: dict[str, Callable[[Path, Sequence[str], int, Picture], None]] = {
    "imagenet-1k": _write_imagenet,
    "imagenet-r": _write_renditions,
    "tiny-imagenet": _write_tiny_imagenet,
    "tiny-imagenet-r": _write_renditions,
}


def load_layout(name: str, path: str, split: str, partial: bool) -> LabeledImages:
    """Load one split of a local copy of a published set.

    Args:
        name: a key of `LAYOUTS`.
        path: the folder of the set, or the folder in which its archive was unpacked; `~` is expanded.
        split: split of the set.
        partial: accept a copy with only some of the classes or images; the classes are then those that are present.

    Raises:
        DataError: something is missing or only partly unpacked. The message says which files are expected in which
            folder.
    """
    folder, layout, load = LAYOUTS[name]
    given = Path(path).expanduser()
    root = given / folder if (given / folder).is_dir() else given
    try:
        return load(_folder(root, f"where a copy of {name} should be"), split, partial)
    except DataError as error:
        raise DataError(f"{name}: {error}. Expected contents of {root}: {layout}") from error
