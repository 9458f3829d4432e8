from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader

from m2mkd.data import DataConfig, ImageDataset, LabeledImages, RepeatedSampler


def dataset(length: int, repeated: int = 3) -> ImageDataset:
    data = LabeledImages(
        [None] * length, np.zeros(length, dtype=np.int64), ["one"], [str(index) for index in range(length)]
    )
    return ImageDataset(data, DataConfig(source="x", repeated=repeated), train=True)


def shards(sampler: RepeatedSampler, processes: int, batch_size: int) -> list[list[list[tuple[int, int]]]]:
    """The batches that accelerate gives each process, in order."""
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    return [list(BatchSamplerShard(batches, processes, process)) for process in range(processes)]


class TestOneProcess:
    @pytest.mark.parametrize("length", [1, 2, 12, 100, 256])
    def test_coverage(self, length):
        indices = list(RepeatedSampler(dataset(length), seed=0))
        assert len(indices) == length == len(set(indices))
        counts = Counter(position for position, _ in indices)
        assert len(counts) == -(-length // 3) and sorted(counts.values())[1:] == [3] * (len(counts) - 1)

    def test_every_image_comes_in_the_long_run(self):
        images, seen = dataset(60), Counter()
        for epoch in range(30):
            images.set_epoch(epoch)
            seen.update({position for position, _ in RepeatedSampler(images, seed=0)})
        assert set(seen) == set(range(60)) and np.mean(list(seen.values())) == 10

    def test_seed_and_epoch_matter(self):
        images = dataset(30)
        first = list(RepeatedSampler(images, seed=0))
        assert first == list(RepeatedSampler(images, seed=0)) != list(RepeatedSampler(images, seed=1))
        images.set_epoch(1)
        assert first != list(RepeatedSampler(images, seed=0))

    def test_without_repeats_it_is_a_permutation(self):
        indices = list(RepeatedSampler(dataset(20, repeated=1), seed=0))
        assert sorted(indices) == [(position, 0) for position in range(20)]


class TestTwoProcesses:
    @pytest.mark.parametrize("length", [48, 50, 97])
    def test_each_entry_once_but_for_padding(self, length):
        first, second = shards(RepeatedSampler(dataset(length), 0, 2, 4), 2, 4)
        assert [len(batch) for batch in first] == [len(batch) for batch in second]
        entries = Counter(index for batch in first + second for index in batch)
        assert len(entries) == length and sum(entries.values()) - length < 8

    def test_copies_fall_on_both(self):
        """As DeiT's: process r takes the entries r, r + 2, … of the shuffled and repeated sequence."""
        first, second = shards(RepeatedSampler(dataset(48), 0, 2, 4), 2, 4)
        sequence = [index for index in RepeatedSampler(dataset(48), 0)]
        assert [index for batch in first for index in batch] == sequence[::2]
        assert [index for batch in second for index in batch] == sequence[1::2]
        copies = [Counter(position for batch in shard for position, _ in batch) for shard in (first, second)]
        assert all({copies[0][position], copies[1][position]} == {1, 2} for position in copies[0] | copies[1])


class TestResume:
    def test_goes_on_with_the_same_entries(self):
        images = dataset(40)
        loader = DataLoader(images, batch_size=4, sampler=RepeatedSampler(images, 0), collate_fn=list)
        images.__class__ = Places
        images.set_epoch(2)
        whole = list(loader)
        again = dataset(40)
        again.__class__ = Places
        again.set_epoch(2)
        resumed = DataLoader(again, batch_size=4, sampler=RepeatedSampler(again, 0), collate_fn=list)
        assert list(skip_first_batches(resumed, 3)) == whole[3:]


class Places(ImageDataset):
    """A data set that returns the requested indices instead of samples."""

    def __getitems__(self, indices):
        return indices
