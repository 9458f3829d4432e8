"""The training set of a process that has a cache of targets."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from m2mkd.data.dataset import ImageDataset
from m2mkd.distillation.target_cache import TargetCache
from m2mkd.errors import DataError


class CachedImages(Dataset[dict[str, Any]]):
    """
    Samples of a training set with targets from a cache, of the same view of the image. Images that no pair needs are
    neither decoded nor augmented.

    Args:
        dataset (`ImageDataset`)
        targets (`TargetCache`)
        names (`Sequence[str]`): What a sample has beside `labels`: `pixel_values`, `boundary_<i>`, `logits`.

    Raises:
        `DataError`: the data set is not an `ImageDataset`.
        `CacheError`: the cache was written for another data set, or files of these targets are missing.
    """

    def __init__(self, dataset: ImageDataset, targets: TargetCache, names: Sequence[str]):
        if not isinstance(dataset, ImageDataset):
            raise DataError(
                f"The training set is a {type(dataset).__name__}, but `targets` need an `ImageDataset`, which tells "
                "the images, their order and their views. Make one of the images, or leave out `targets`."
            )
        targets.check(data=dataset.fingerprint())
        self._has_images = "pixel_values" in names
        self._names = [name for name in names if name != "pixel_values"]
        targets.check_files(self._names)
        self.dataset, self.targets = dataset, targets

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which the view depends on."""
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at a position, with targets without a batch dimension. Raises `IndexError`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        sample = self.dataset[index] if self._has_images else self.dataset.label(index)
        view = self.dataset.view
        return {**sample, **{name: self.targets.read(name, view, index) for name in self._names}}
