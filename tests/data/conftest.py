"""Tiny image folders and an in-memory set that the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from m2mkd.data import ImageDataset, LabeledImages


def noise_image(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def read_all() -> Callable[[ImageDataset, int], None]:
    """Read every sample of a data set through a `DataLoader`, and stop its worker even after an error.

    Left to the garbage collector, a worker of torch takes five seconds to go.
    """

    def read(dataset: ImageDataset, workers: int) -> None:
        iterator = iter(DataLoader(dataset, num_workers=workers))
        try:
            for _ in iterator:
                pass
        finally:
            if workers:
                iterator._shutdown_workers()

    return read


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[dict[str, int]], Path]:
    """Write an imagefolder with the given number of images per class; all images differ."""

    def make(counts: dict[str, int]) -> Path:
        root = tmp_path / "images"
        for name, count in counts.items():
            (root / name).mkdir(parents=True)
            for index in range(count):
                noise_image(hash((name, index)) % 2**32).save(root / name / f"{index:03d}.png")
        return root

    return make


@pytest.fixture
def noise_data() -> LabeledImages:
    """Twelve noise images of different sizes in three classes."""
    images = [noise_image(seed, (20 + seed, 30 - seed)) for seed in range(12)]
    labels = np.arange(12, dtype=np.int64) % 3
    return LabeledImages(images, labels, ["ant", "bee", "cat"], [f"noise[{index}]" for index in range(12)])
