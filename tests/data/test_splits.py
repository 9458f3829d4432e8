import numpy as np
import pytest

from m2mkd.data import DataError
from m2mkd.data.splits import holdout_indices, sample_per_class


LABELS = np.array([0, 1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=np.int64)
NAMES = ["few", "many"]


class TestHoldout:
    def test_share_of_each_class(self):
        train, test = holdout_indices(LABELS, NAMES, 0.5)
        assert np.bincount(LABELS[test]).tolist() == [2, 3]
        assert sorted([*train, *test]) == list(range(10))

    @pytest.mark.parametrize("share", [0.01, 0.99])
    def test_no_side_is_empty(self, share):
        train, test = holdout_indices(LABELS, NAMES, share)
        assert np.bincount(LABELS[train]).min() >= 1 and np.bincount(LABELS[test]).min() >= 1

    def test_class_of_one(self):
        with pytest.raises(DataError, match="class 'few' has 1 images"):
            holdout_indices(np.array([0, 1, 1]), NAMES, 0.5)


class TestSamplePerClass:
    def test_counts_and_seed(self):
        labels = np.repeat(np.arange(2), 50)
        chosen = sample_per_class(labels, NAMES, 10, seed=1)
        assert np.bincount(labels[chosen]).tolist() == [10, 10]
        assert np.array_equal(chosen, sample_per_class(labels, NAMES, 10, seed=1))
        assert not np.array_equal(chosen, sample_per_class(labels, NAMES, 10, seed=2))

    def test_a_larger_part_contains_the_smaller(self):
        labels = np.repeat(np.arange(2), 50)
        assert set(sample_per_class(labels, NAMES, 5, seed=1)) < set(sample_per_class(labels, NAMES, 20, seed=1))

    def test_too_few(self):
        with pytest.raises(DataError, match="class 'few' has 4 images, but samples_per_class asks for 5"):
            sample_per_class(LABELS, NAMES, 5, seed=0)
