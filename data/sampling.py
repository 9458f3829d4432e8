"""The order of a training set whose images are repeated within an epoch, each time with another augmentation."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from m2mkd.data.dataset import ImageDataset


class RepeatedSampler(Sampler[tuple[int, int]]):
    """Repeated augmentation (Hoffer et al., arXiv 1901.09335; Berman et al., arXiv 1902.05509), as DeiT does it.

    An epoch keeps its length n: it takes n / repeated of the images, drawn again for each epoch, `repeated` times
    each. Entry k of the shuffled, repeated sequence goes to process k mod `num_processes`, so that the copies of an
    image go to different processes. (DeiT rounds an epoch down to a multiple of 256; we take all n.)

    The indices are ordered by whole batches, one process after the other, because that is how accelerate distributes
    them. The order depends only on the seed and on the epoch of the data set, so a resumed run continues with the same
    images.

    Args:
        dataset: data set that gives the length, the repeats (`config.repeated`) and the epoch.
        seed: seed of the order, at least 0.
        num_processes: number of processes that share the batches.
        batch_size: number of images per process and batch.
    """

    def __init__(self, dataset: ImageDataset, seed: int, num_processes: int = 1, batch_size: int = 1) -> None:
        self.dataset = dataset
        self.seed = seed
        self.num_processes = num_processes
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield pairs (position, repeat), which are indices of an `ImageDataset`."""
        repeated, length = self.dataset.config.repeated, len(self.dataset)
        order = np.random.default_rng((self.seed, self.dataset.epoch)).permutation(length)
        for entry in self._entries(length):
            yield int(order[entry // repeated]), int(entry % repeated)

    def _entries(self, length: int) -> Iterator[int]:
        """Yield 0..length-1, ordered batch by batch and process by process."""
        step = self.num_processes * self.batch_size
        for start in range(0, length, step):
            stop = min(start + step, length)
            for process in range(self.num_processes):
                yield from range(start + process, stop, self.num_processes)
