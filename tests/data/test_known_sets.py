from io import BytesIO
from typing import get_args

import datasets
import pytest
from PIL import Image

from m2mkd.data import DataConfig, DataError, load_images
from m2mkd.data.config import NamedSource, PackagedSource
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.known_sets import KNOWN_SETS, PACKAGED_SPLITS, splits_of
from m2mkd.data.layouts import LAYOUTS


def test_every_name_has_both_ways():
    assert set(KNOWN_SETS) == set(LAYOUTS) == set(get_args(NamedSource))
    assert set(PACKAGED_SPLITS) == set(get_args(PackagedSource))


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [("imagenet-1k", 1000, "n01440764"), ("tiny-imagenet-r", 62, "n01443537"), ("cifar100", 100, "0")],
)
def test_classes_are_known_without_images(name, count, first):
    classes = KNOWN_SETS[name].classes
    assert len(set(classes)) == count and classes[0] == first


@pytest.mark.parametrize(
    ("source", "splits"),
    [
        ("tiny-imagenet:a/copy", ("train", "val")),
        ("cub-200", ("train", "test")),
        ("mnist5k", ("train", "test")),
        ("uci_digits", ("test",)),
        ("glyphs", ("train", "handwriting", "test")),
        ("imagefolder:train", ()),
        ("somebody/images", ()),
    ],
)
def test_splits_are_known_by_the_source(source, splits):
    assert splits_of(source) == splits


@pytest.fixture
def hub(monkeypatch):
    """A fake Hub with one data set, `rows` by column, that records what was requested."""
    asked = []

    def serve(features, rows):
        buffer = BytesIO()
        Image.new("RGB", (8, 6)).save(buffer, "PNG")
        count = len(next(iter(rows.values())))
        image = next(name for name, feature in features.items() if isinstance(feature, datasets.Image))
        rows = {**rows, image: [{"bytes": buffer.getvalue(), "path": None}] * count}
        data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))

        def load_dataset(source, config_name, split):
            asked.append((source, split))
            return data

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


class TestHub:
    def test_names_in_words_become_ids(self, hub):
        names = [f"thing {index}" for index in range(1000)]
        asked = hub({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}, {"label": [999, 0]})
        data = load_images(DataConfig(source="imagenet-1k", split="val"))
        assert asked == [("ILSVRC/imagenet-1k", "validation")]
        assert data.class_names == imagenet_classes() and data.labels.tolist() == [999, 0]

    def test_ids_are_matched_whatever_their_order(self, hub):
        classes = imagenet_classes("tiny")
        hub({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes[::-1])}, {"label": [0, 199]})
        data = load_images(DataConfig(source="tiny-imagenet", split="val"))
        assert data.class_names == classes and data.labels.tolist() == [199, 0]

    def test_tiny_renditions_are_the_shared_classes_of_imagenet_r(self, hub):
        wnids = imagenet_classes("r")
        hub({"image": datasets.Image(), "wnid": datasets.Value("string")}, {"wnid": wnids})
        data = load_images(DataConfig(source="tiny-imagenet-r"))
        assert data.class_names == imagenet_classes("tiny", "r") and len(data) == 62
        assert data.images[0].size == (64, 64)
        assert len(load_images(DataConfig(source="imagenet-r"))) == 200

    def test_columns_of_cifar100(self, hub):
        label = datasets.ClassLabel(names=["apple", "pear"])
        asked = hub({"img": datasets.Image(), "fine_label": label}, {"fine_label": [1, 0]})
        data = load_images(DataConfig(source="cifar100", split="train"))
        assert asked == [("uoft-cs/cifar100", "train")] and data.class_names == ["apple", "pear"]

    def test_another_number_of_classes(self, hub):
        hub({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}, {"label": [0]})
        with pytest.raises(DataError, match="has 2 classes instead of 1000: use a local copy, 'imagenet-1k:PATH'"):
            load_images(DataConfig(source="imagenet-1k", split="val"))

    def test_no_network_names_the_local_way(self, monkeypatch):
        def load_dataset(*args, **kwargs):
            raise ConnectionError("no network")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match="no network.*or use a local copy, 'tiny-imagenet:PATH'"):
            load_images(DataConfig(source="tiny-imagenet", split="val"))

    def test_split(self):
        with pytest.raises(DataError, match="cifar10 has no split None: set split to 'train' or 'test'"):
            load_images(DataConfig(source="cifar10"))
