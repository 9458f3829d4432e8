import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2mkd.data import DataConfig, DataError, ImageDataset, class_counts, load_images
from m2mkd.data.imagefolder import load_imagefolder, load_unlabeled


class TestLoadImagefolder:
    def test_classes_and_names(self, make_folder):
        root = make_folder({"zebra": 2, "ant": 3})
        data = load_imagefolder(str(root))
        assert class_counts(data) == {"ant": 3, "zebra": 2} and data.class_names == ["ant", "zebra"]
        assert data.names[3] == str(root / "zebra" / "000.png")
        assert data.images[3].mode == "RGB" and data.images[3].size == (12, 10)

    def test_images_may_lie_deeper(self, make_folder):
        root = make_folder({"ant": 1})
        (root / "ant" / "deep").mkdir()
        (root / "ant" / "000.png").rename(root / "ant" / "deep" / "000.png")
        assert load_imagefolder(str(root)).names == [str(root / "ant" / "deep" / "000.png")]

    def test_junk_is_passed_over(self, make_folder):
        root = make_folder({"ant": 1})
        for name in (".DS_Store", "Thumbs.db", "._000.png"):
            (root / "ant" / name).write_bytes(b"junk")
        (root / ".git").mkdir()
        (root / "ant" / ".thumbnails").mkdir()
        (root / "ant" / ".thumbnails" / "000.png").write_bytes(b"junk")
        assert len(load_imagefolder(str(root))) == 1

    def test_missing_path(self, tmp_path):
        with pytest.raises(DataError, match="nowhere is not a folder"):
            load_imagefolder(str(tmp_path / "nowhere"))

    def test_no_sub_folders(self, tmp_path):
        with pytest.raises(DataError, match="no sub-folders"):
            load_imagefolder(str(tmp_path))

    def test_empty_class(self, make_folder):
        with pytest.raises(DataError, match="the folder .*bee has no images"):
            load_imagefolder(str(make_folder({"ant": 1, "bee": 0})))

    @pytest.mark.parametrize("names", [["train", "test", "ood"], ["Training", "val"]])
    def test_a_folder_of_splits_is_refused(self, make_folder, names):
        root = make_folder({f"{name}/{kind}": 1 for name in names for kind in ("ant", "bee")})
        (root / "README.md").write_text("how it was made")
        with pytest.raises(DataError, match="holds splits, not classes") as caught:
            load_imagefolder(str(root))
        assert all(f"imagefolder:{root / name}" in str(caught.value) for name in names)
        assert load_imagefolder(str(root / names[0])).class_names == ["ant", "bee"]

    def test_a_class_may_be_called_like_a_split(self, make_folder):
        assert load_imagefolder(str(make_folder({"car": 1, "test": 2}))).class_names == ["car", "test"]

    @pytest.mark.parametrize("where", ["ant/notes.txt", "notes.txt", "stray.png"])
    def test_stray_file_is_named(self, make_folder, where):
        root = make_folder({"ant": 1})
        (root / where).write_bytes(b"x")
        with pytest.raises(DataError, match=where):
            load_imagefolder(str(root))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_corrupt_image_is_named_at_access(self, make_folder, read_all, workers):
        root = make_folder({"ant": 3})
        whole = (root / "ant" / "001.png").read_bytes()
        (root / "ant" / "001.png").write_bytes(whole[: len(whole) // 2])
        config = DataConfig(source=f"imagefolder:{root}", image_size=8)
        dataset = ImageDataset(load_images(config), config, train=False)
        assert dataset[0]["pixel_values"].shape == (3, 8, 8)
        with pytest.raises(DataError, match="cannot decode the image .*001.png"):
            read_all(dataset, workers)


class TestHoldout:
    def load(self, root, split, holdout=0.25):
        return load_images(DataConfig(source=f"imagefolder:{root}", split=split, holdout=holdout))

    def test_parts(self, make_folder):
        root = make_folder({"ant": 8, "bee": 4})
        train, test = self.load(root, "train"), self.load(root, "test")
        assert class_counts(train) == {"ant": 6, "bee": 3} and class_counts(test) == {"ant": 2, "bee": 1}
        assert not {*train.names} & {*test.names}
        assert test.names == self.load(root, "test").names
        assert np.array_equal(np.asarray(test.images[2]), np.asarray(Image.open(test.names[2])))

    def test_split_without_holdout(self, make_folder):
        with pytest.raises(DataError, match="set holdout"):
            self.load(make_folder({"ant": 2}), "test", holdout=0.0)

    def test_holdout_without_split(self, make_folder):
        with pytest.raises(DataError, match="use 'train' or 'test'"):
            self.load(make_folder({"ant": 2}), None)

    def test_samples_per_class(self, make_folder):
        root = make_folder({"ant": 8, "bee": 4})
        config = {"source": f"imagefolder:{root}", "split": "train", "holdout": 0.25}
        train = load_images(DataConfig(**config))
        part = load_images(DataConfig(**config, samples_per_class=3))
        assert class_counts(part) == {"ant": 3, "bee": 3} and {*part.names} < {*train.names}
        with pytest.raises(DataError, match="class 'bee' has 3 images, but samples_per_class asks for 4"):
            load_images(DataConfig(**config, samples_per_class=4))


class TestUnlabeled:
    def test_all_images_below_a_folder_in_the_order_of_their_paths(self, tmp_path: Path) -> None:
        for name in ("b.png", "a.png", "deep/er/c.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        data = load_unlabeled(str(tmp_path))
        assert [os.path.relpath(name, tmp_path) for name in data.names] == ["a.png", "b.png", "deep/er/c.png"]

    def test_a_folder_without_images_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no images"):
            load_unlabeled(str(tmp_path))
        with pytest.raises(DataError, match="nowhere is not a folder"):
            load_unlabeled(str(tmp_path / "nowhere"))
