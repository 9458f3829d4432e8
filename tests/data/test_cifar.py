import pickle

import numpy as np
import pytest
from published_sets import cifar, cifar_pixels, picture

from m2mkd.data import DataConfig, DataError, class_counts, load_images


def load(name, root, split, partial=True):
    return load_images(DataConfig(source=f"{name}:{root}", split=split, partial=partial))


class Shell:
    """An object that a hostile pickle could contain."""

    def __reduce__(self):
        return print, ("this ran",)


class TestLoadCifar:
    def test_cifar10(self, tmp_path):
        root = cifar(tmp_path / "cifar-10-batches-py")
        train, test = load("cifar10", tmp_path, "train"), load("cifar10", root, "test")
        assert len(train) == 30 and len(test) == 6
        assert class_counts(test) == {"airplane": 2, "automobile": 2, "bird": 2}
        expected = cifar_pixels(6, seed=1)[2].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(np.asarray(train.images[8]), expected)  # the third image of the second file
        assert len(train.images[3:5]) == 2

    def test_cifar100_has_fine_classes(self, tmp_path):
        data = load("cifar100", cifar(tmp_path, "cifar100"), "test")
        assert data.class_names == ["apple", "aquarium_fish", "baby"] and data.names[2] == "cifar100:test[2]"

    def test_too_few(self, tmp_path):
        with pytest.raises(DataError, match="has 30 images, but the published set has 50,000"):
            load("cifar10", cifar(tmp_path), "train", partial=False)

    def test_class_folders(self, tmp_path):
        for name in ("airplane", "bird"):
            picture(tmp_path / "test" / name / "0.png")
        assert class_counts(load("cifar10", tmp_path, "test")) == {"airplane": 1, "bird": 1}

    def test_missing_file(self, tmp_path):
        root = cifar(tmp_path)
        (root / "data_batch_3").unlink()
        with pytest.raises(DataError, match=r"data_batch_3 is missing.*Expected contents of .*data_batch_1 to 5"):
            load("cifar10", root, "train")

    def test_runs_nothing(self, tmp_path, capsys):
        root = cifar(tmp_path)
        (root / "test_batch").write_bytes(pickle.dumps({b"data": Shell(), b"labels": []}))
        with pytest.raises(DataError, match=r"tries to load builtins.print, which a CIFAR file never needs"):
            load("cifar10", root, "test")
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2])])
    def test_damaged(self, tmp_path, content):
        root = cifar(tmp_path)
        (root / "test_batch").write_bytes(content)
        with pytest.raises(DataError, match="test_batch is not a Python file of CIFAR"):
            load("cifar10", root, "test")

    @pytest.mark.parametrize(("shape", "labels"), [((4, 3072), 3), ((4, 100), 4)])
    def test_shapes(self, tmp_path, shape, labels):
        root = cifar(tmp_path)
        content = {b"data": np.zeros(shape, dtype=np.uint8), b"labels": [0] * labels}
        (root / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(DataError, match="row of 3072 bytes with one label"):
            load("cifar10", root, "test")

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_every_protocol(self, tmp_path, protocol):
        root = cifar(tmp_path)
        content = {b"data": cifar_pixels(3), b"labels": [0, 1, 2]}
        (root / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
        assert len(load("cifar10", root, "test")) == 3
