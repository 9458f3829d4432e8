from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image

from m2mkd.data import DataConfig, DataError, ImageDataset, class_counts, load_images


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def png(value: int) -> bytes:
    buffer = BytesIO()
    Image.new("L", (6, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def make(labels, feature, images=None, image_feature=None, column="label"):
    images = images or [{"bytes": png(index), "path": None} for index in range(len(labels))]
    features = datasets.Features({"image": image_feature or datasets.Image(), column: feature})
    return datasets.Dataset.from_dict({"image": images, column: labels}, features=features)


def saved(dataset, tmp_path, **options):
    dataset.save_to_disk(tmp_path / "saved")
    return load_images(DataConfig(source=str(tmp_path / "saved"), **options))


ANIMALS = datasets.ClassLabel(names=["cat", "ant", "bee"])


class TestLabels:
    def test_class_label(self, tmp_path):
        data = saved(make([2, 0, 2], ANIMALS), tmp_path)
        assert class_counts(data) == {"cat": 1, "ant": 0, "bee": 2} and data.labels.tolist() == [2, 0, 2]
        assert [np.asarray(image)[0, 0].tolist() for image in data.images] == [[0] * 3, [1] * 3, [2] * 3]

    def test_integers(self, tmp_path):
        data = saved(make([3, 0], datasets.Value("int8")), tmp_path)
        assert data.class_names == ["0", "1", "2", "3"] and data.labels.tolist() == [3, 0]

    def test_strings(self, tmp_path):
        data = saved(make(["wasp", "ant", "wasp"], datasets.Value("string")), tmp_path)
        assert data.class_names == ["ant", "wasp"] and data.labels.tolist() == [1, 0, 1]

    @pytest.mark.parametrize(
        ("labels", "feature", "message"),
        [
            ([0, None], ANIMALS, "1 rows of .* have no 'label'"),
            ([0, -1], ANIMALS, r"\[1\] has label -1"),
            ([0.5, 1.0], datasets.Value("float32"), "must be ClassLabel, integer or string"),
            ([True, False], datasets.Value("bool"), "must be ClassLabel, integer or string"),
        ],
    )
    def test_refuses(self, tmp_path, labels, feature, message):
        with pytest.raises(DataError, match=message):
            saved(make(labels, feature), tmp_path)


class TestColumns:
    def test_missing_column_lists_the_columns(self, tmp_path):
        with pytest.raises(DataError, match=r"no column 'label', its columns are \['image', 'fine'\]"):
            saved(make([0], ANIMALS, column="fine"), tmp_path)

    def test_other_names(self, tmp_path):
        dataset = make([1, 0], ANIMALS, column="fine").rename_column("image", "img")
        assert saved(dataset, tmp_path, image_column="img", label_column="fine").labels.tolist() == [1, 0]

    def test_no_images(self, tmp_path):
        dataset = make([0], ANIMALS, images=[5], image_feature=datasets.Value("int64"))
        with pytest.raises(DataError, match="must be an Image"):
            saved(dataset, tmp_path)

    def test_no_rows(self, monkeypatch):
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: make([], datasets.Value("int64")))
        with pytest.raises(DataError, match="no rows in split 'train'"):
            load_images(DataConfig(source="someone/empty", split="train"))


class TestCorrupt:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_bytes(self, tmp_path, read_all, workers):
        images = [{"bytes": png(1), "path": None}, {"bytes": b"not an image", "path": None}]
        data = saved(make([0, 1], ANIMALS, images), tmp_path)
        config = DataConfig(source="unused", image_size=4)
        dataset = ImageDataset(data, config, train=False)
        assert dataset[0]["pixel_values"].shape == (3, 4, 4)
        with pytest.raises(DataError, match=r"cannot decode the image .*saved\[1\]"):
            read_all(dataset, workers)

    def test_no_image(self, tmp_path):
        data = saved(make([0, 1], ANIMALS, [{"bytes": png(1), "path": None}, None]), tmp_path)
        with pytest.raises(DataError, match=r"saved\[1\] has no image"):
            data.images[1]


class TestSplits:
    def test_dictionary(self, tmp_path):
        both = datasets.DatasetDict(train=make([0, 1], ANIMALS), test=make([2], ANIMALS))
        assert saved(both, tmp_path, split="test").labels.tolist() == [2]
        with pytest.raises(
            DataError, match=r"no split of .*saved is chosen: set split to one of \['test', 'train'\]$"
        ):
            load_images(DataConfig(source=str(tmp_path / "saved")))
        with pytest.raises(DataError, match=r"saved has no split 'val': set split to one of"):
            load_images(DataConfig(source=str(tmp_path / "saved"), split="val"))

    def test_single(self, tmp_path):
        with pytest.raises(DataError, match="is a single data set without a split 'test': leave split out"):
            saved(make([0, 1], ANIMALS), tmp_path, split="test")

    def test_load_dataset_of_a_folder(self, make_folder, monkeypatch, tmp_path):
        """The builder of `datasets` for image folders finds what ours finds, also through a slice."""
        root = make_folder({"bee": 2, "ant": 3})
        original = datasets.load_dataset
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *args, **kw: original(*args, **kw, cache_dir=tmp_path / "cache")
        )
        ours = load_images(DataConfig(source=f"imagefolder:{root}"))
        theirs = load_images(DataConfig(source=str(root), split="train"))
        assert theirs.class_names == ours.class_names and theirs.labels.tolist() == ours.labels.tolist()
        assert np.array_equal(np.asarray(theirs.images[4]), np.asarray(ours.images[4]))
        assert len(load_images(DataConfig(source=str(root), split="train[:2]"))) == 2
        with pytest.raises(DataError, match=f"no split of {root} is chosen: .*, or give 'imagefolder:{root}' if"):
            load_images(DataConfig(source=str(root)))
        with pytest.raises(DataError, match="split='valid'.*check the id"):
            load_images(DataConfig(source=str(root), split="valid"))

    def test_unknown_source(self, tmp_path):
        with pytest.raises(DataError, match="cannot open source='.*nowhere'.*network"):
            load_images(DataConfig(source=str(tmp_path / "nowhere"), split="train"))
