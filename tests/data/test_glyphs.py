import importlib.util

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import m2mkd.data.glyphs
from m2mkd.data import DataConfig, DataError, class_counts, load_images
from m2mkd.data.glyphs import SPLITS, load_glyphs


PACKAGES = ("trdg", "font_intuitive", "handwriting_generator")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pixels(split):
    """uint8 (n, 28, 28); the three channels are equal."""
    arrays = np.stack([np.asarray(image) for image in load_glyphs(split).images])
    assert np.array_equal(arrays[..., 0], arrays[..., 2])
    return arrays[..., 0]


def fonts(split):
    return {name.split("/")[1] for name in load_glyphs(split).names}


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason=f"needs the fonts: {m2mkd.data.glyphs.INSTALL}"
)
class TestGlyphs:
    @pytest.mark.parametrize(
        ("split", "count", "faces"), [("train", 154, 77), ("test", 40, 10), ("handwriting", 40, 5)]
    )
    def test_sizes(self, split, count, faces):
        data = load_images(DataConfig(source="glyphs", split=split))
        assert class_counts(data) == dict.fromkeys(LETTERS, count)
        assert len(fonts(split)) == faces and len(set(data.names)) == len(data)

    def test_splits_share_no_family(self):
        families = [{font.split("-")[0].split("_")[0] for font in fonts(split)} for split in SPLITS]
        assert not families[0] & families[1] and not families[2] & (families[0] | families[1])

    def test_label_is_the_letter_that_was_drawn(self):
        data = load_glyphs("test")
        assert data.names[:3] == ["glyphs/CaviarDreams/a/0", "glyphs/CaviarDreams/a/1", "glyphs/CaviarDreams/b/0"]
        for name, label in zip(data.names, data.labels, strict=True):
            assert name.split("/")[2].lower() == data.class_names[label]

    @pytest.mark.parametrize("split", list(SPLITS))
    def test_look(self, split):
        arrays = pixels(split)
        assert arrays.shape[1:] == (28, 28) and arrays.dtype == np.uint8
        border = np.concatenate([arrays[:, 0], arrays[:, -1], arrays[:, :, 0], arrays[:, :, -1]])
        assert border.mean() < 0.5, "letters are white on black and lie inside the image"
        first, last = (
            np.stack([(turned.max(axis) > 40).argmax(1) for axis in (1, 2)])
            for turned in (arrays, arrays[:, ::-1, ::-1])
        )
        assert np.abs(first - last).max() <= 3, "letters are centered but for their shift"
        longer = (28 - first - last).max(0)
        assert longer.min() >= 13 and longer.max() <= 25
        assert arrays.max((1, 2)).min() > 100, "no letter is too faint"
        share_of_grey = ((arrays > 20) & (arrays < 235)).sum() / (arrays > 20).sum()
        assert share_of_grey > 0.3, "edges are smooth"

    def test_always_the_same_and_never_twice(self):
        first = pixels("handwriting")
        load_glyphs.cache_clear()
        assert np.array_equal(first, pixels("handwriting"))
        assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(first), "repeats differ"

    def test_labels_fit_the_images(self):
        """Nearest neighbors on printed letters know most of other printed letters, and fewer of handwriting."""
        train = KNeighborsClassifier(1).fit(pixels("train").reshape(-1, 784), load_glyphs("train").labels)
        test, handwriting = (
            train.score(pixels(split).reshape(-1, 784), load_glyphs(split).labels) for split in ("test", "handwriting")
        )
        assert test > 0.75 and 0.3 < handwriting < test - 0.15

    @pytest.mark.parametrize("split", [None, "validation"])
    def test_needs_a_split(self, split):
        with pytest.raises(DataError, match="use 'train' or 'handwriting' or 'test'"):
            load_images(DataConfig(source="glyphs", split=split))

    def test_another_release_of_a_package(self, monkeypatch):
        monkeypatch.setitem(SPLITS, "test", (1, {"trdg/fonts/latin": ("Sansation-*", "Helvetica*")}))
        load_glyphs.cache_clear()
        with pytest.raises(DataError, match=r"no font Helvetica\*\.ttf in .*latin"):
            load_glyphs("test")


def test_missing_package(monkeypatch):
    load_glyphs.cache_clear()
    monkeypatch.setattr(m2mkd.data.glyphs, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"inside trdg.*: pip install --no-deps trdg font-intuitive"):
        load_images(DataConfig(source="glyphs", split="train"))
