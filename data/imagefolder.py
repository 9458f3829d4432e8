"""Image folders with one sub-folder per class."""

import os

import numpy as np
from PIL import Image

from m2mkd.data.decoding import decode_image
from m2mkd.data.labeled_images import LabeledImages, LazyImages
from m2mkd.errors import DataError


JUNK = {"thumbs.db", "desktop.ini", "__macosx"}
# What the parts of a data set are called, in lower case.
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev"}
SPLIT_NAMES |= {"iid", "ood", "holdout"}


def is_junk(name: str) -> bool:
    """Whether this file or folder was left behind by an operating system or an editor."""
    return name.startswith(".") or name.lower() in JUNK


def image_extensions() -> set[str]:
    """Lower-case extensions that Pillow can read (it registers some that it can only write)."""
    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _check_extension(path: str, extensions: set[str]) -> None:
    if os.path.splitext(path)[1].lower() not in extensions:
        raise DataError(
            f"{path} does not have the extension of an image, but an imagefolder may contain only images: move it away"
        )


def _check_no_loop(parent: str, folders: list[str]) -> None:
    for path in (os.path.join(parent, name) for name in folders):
        if os.path.islink(path) and (os.path.realpath(parent) + os.sep).startswith(os.path.realpath(path) + os.sep):
            raise DataError(f"the link {path} leads back to a folder that it is in: remove it")


def class_files(folder: str, extensions: set[str]) -> list[str]:
    """Sorted paths of all images below the folder of one class.

    Raises:
        DataError: the folder has no images, or a file is not an image.
    """
    paths: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_junk(name)]
        _check_no_loop(parent, folders)
        paths.extend(os.path.join(parent, name) for name in files if not is_junk(name))
    for path in paths:
        _check_extension(path, extensions)
    if not paths:
        raise DataError(f"the folder {folder} has no images: add some or remove it")
    return sorted(paths)


def _has_class_folders(folder: str, extensions: set[str]) -> bool:
    """Whether there are images in the sub-folders of a folder."""
    deeper = (names for parent, _, names in os.walk(folder) if parent != folder)
    return any(os.path.splitext(name)[1].lower() in extensions for names in deeper for name in names)


def _check_no_splits(root: str, class_names: list[str], extensions: set[str]) -> None:
    """Refuse a folder of splits. A class may be called "test" as long as its images lie directly in its folder."""
    splits = [
        name
        for name in class_names
        if name.lower() in SPLIT_NAMES and _has_class_folders(os.path.join(root, name), extensions)
    ]
    if splits:
        sources = " or ".join(f"imagefolder:{os.path.join(root, name)}" for name in splits)
        raise DataError(
            f"imagefolder {root} holds splits, not classes: there are class folders in {' and '.join(splits)}. Give "
            f"one of them as `source`: {sources}. If it is a class, put its images directly into its folder"
        )


def load_unlabeled(path: str) -> LabeledImages:
    """Every image below `path`, in the order of the paths, without labels: all have label 0 of one nameless class.

    Args:
        path: the folder; `~` is expanded.

    Raises:
        DataError: the folder does not exist, it has no images, or a file is not an image.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder: give the path of a folder with images")
    paths = class_files(root, image_extensions())
    return LabeledImages(LazyImages(paths, decode_image), np.zeros(len(paths), dtype=np.int64), [""], paths)


def load_imagefolder(path: str) -> LabeledImages:
    """Every image below `path`; the names of its sub-folders, sorted, are the classes.

    Images may be in sub-folders of the folder of their class. Hidden files and files that operating systems leave
    behind are skipped. Any other file that is not an image is an error, so that no sample is silently lost.

    Args:
        path: the folder; `~` is expanded.

    Raises:
        DataError: the folder does not exist, it has no sub-folders, it has splits instead of classes, a class has no
            images, or a file is not an image.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise DataError(f"imagefolder {root} is not a folder: give the path of a folder with one sub-folder per class")
    with os.scandir(root) as entries:
        visible = sorted((entry for entry in entries if not is_junk(entry.name)), key=lambda entry: entry.name)
    class_names = [entry.name for entry in visible if entry.is_dir()]
    if not class_names:
        raise DataError(
            f"imagefolder {root} has no sub-folders: put the images of each class in a sub-folder with its name"
        )
    extensions = image_extensions()
    # first: beside splits there is often a file that says what they are
    _check_no_splits(root, class_names, extensions)
    loose = [entry.path for entry in visible if not entry.is_dir()]
    if loose:
        raise DataError(f"{loose[0]} is not inside a class folder: move it into the folder of its class, or away")
    files = [class_files(os.path.join(root, name), extensions) for name in class_names]
    labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(paths) for paths in files])
    paths = [path for class_paths in files for path in class_paths]
    return LabeledImages(LazyImages(paths, decode_image), labels, class_names, paths)
