"""Tiny copies of published data sets, in the folders of the originals."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.layouts import WRITERS


def picture(path: Path, value: int = 0, size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, 90, 160)).save(path)


def imagenet(root: Path, classes: list[str], per_class: int = 2) -> Path:
    WRITERS["imagenet-1k"](root, classes, per_class, picture)
    return root


def renditions(root: Path, classes: list[str], per_class: int = 2) -> Path:
    """ImageNet-R or Tiny-ImageNet-R."""
    WRITERS["imagenet-r"](root, classes, per_class, partial(picture, size=(20, 10)))
    (root / "README.txt").write_text("ImageNet-R")
    return root


def tiny_imagenet(root: Path, classes: list[str], per_class: int = 2) -> Path:
    WRITERS["tiny-imagenet"](root, classes, per_class, picture)
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(reversed(annotations.read_text().splitlines())))
    for wnid in classes:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    (root / "wnids.txt").write_text("\n".join(classes))
    (root / "words.txt").write_text("\n".join(f"{wnid}\tthing {wnid}" for wnid in imagenet_classes()))
    return root


def cub(root: Path, classes: int = 3, per_class: int = 4) -> Path:
    images, labels, splits = [], [], []
    for label in range(1, classes + 1):
        name = f"{label:03d}.Bird_{label}"
        for index in range(per_class):
            number = len(images) + 1
            picture(root / "images" / name / f"Bird_{label}_{index}.jpg", label)
            images.append(f"{number} {name}/Bird_{label}_{index}.jpg")
            labels.append(f"{number} {label}")
            splits.append(f"{number} {index % 2}")
    (root / "images.txt").write_text("\n".join(images))
    (root / "image_class_labels.txt").write_text("\n".join(labels))
    (root / "train_test_split.txt").write_text("\n".join(splits))
    (root / "classes.txt").write_text(
        "\n".join(f"{label} {label:03d}.Bird_{label}" for label in range(1, classes + 1))
    )
    return root


def cifar_pixels(count: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, 3072): red, green and blue planes after each other, as in the files."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def cifar(root: Path, name: str = "cifar10", per_file: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    if name == "cifar10":
        files, key = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"], b"labels"
        meta = ("batches.meta", {b"label_names": [b"airplane", b"automobile", b"bird"]})
    else:
        files, key = ["train", "test"], b"fine_labels"
        meta = (
            "meta",
            {b"fine_label_names": [b"apple", b"aquarium_fish", b"baby"], b"coarse_label_names": [b"fruit"]},
        )
    for number, file in enumerate(files):
        content = {b"data": cifar_pixels(per_file, number), key: [index % 3 for index in range(per_file)]}
        (root / file).write_bytes(pickle.dumps(content, protocol=2))
    (root / meta[0]).write_bytes(pickle.dumps(meta[1], protocol=2))
    return root
