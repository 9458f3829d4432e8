from pathlib import Path

import numpy as np
import pytest
from published_sets import cub, imagenet, picture, renditions, tiny_imagenet

from m2mkd.data import DataConfig, DataError, class_counts, load_images
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.known_sets import splits_of
from m2mkd.data.layouts import WRITERS


SHARED = imagenet_classes("tiny", "r")
THREE = SHARED[:3]


def load(source: str, root: Path, split: str | None = None, partial: bool = True):
    return load_images(DataConfig(source=f"{source}:{root}", split=split, partial=partial))


class TestClasses:
    def test_counts(self):
        counts = [len(imagenet_classes(*marks)) for marks in [(), ("tiny",), ("r",), ("tiny", "r")]]
        assert counts == [1000, 200, 200, 62]

    def test_order_is_that_of_the_labels(self):
        classes = imagenet_classes()
        assert classes == sorted(classes) and classes[0] == "n01440764" and classes[-1] == "n15075141"


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_what_is_read(tmp_path, name):
    WRITERS[name](tmp_path, THREE, 2, picture)
    for split in splits_of(name):
        assert class_counts(load(name, tmp_path, split)) == dict.fromkeys(THREE, 2)


class TestImageNet:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_part(self, tmp_path, split):
        data = load("imagenet-1k", imagenet(tmp_path, THREE), split)
        assert class_counts(data) == dict.fromkeys(THREE, 2)

    def test_the_folder_above(self, tmp_path):
        imagenet(tmp_path / "imagenet", THREE)
        assert len(load("imagenet-1k", tmp_path, "val")) == 6

    def test_whole_copy_without_partial_says_what_is_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"lacks 997 of the 1000 class folders \(n01440764, .* and 992 more\)"):
            load("imagenet-1k", imagenet(tmp_path, THREE), "val", partial=False)

    def test_all_folders_but_too_few_images(self, tmp_path):
        root = imagenet(tmp_path, [])
        for wnid in imagenet_classes():
            (root / "val" / wnid).mkdir(parents=True)
            (root / "val" / wnid / "0.JPEG").touch()
        with pytest.raises(DataError, match="has 1,000 images, but the published set has 50,000"):
            load("imagenet-1k", root, "val", partial=False)

    def test_split(self, tmp_path):
        with pytest.raises(DataError, match="no split 'test': set split to 'train' or 'val'"):
            load("imagenet-1k", imagenet(tmp_path, THREE), "test")

    def test_missing_folder(self, tmp_path):
        with pytest.raises(
            DataError, match=r"there is no folder .*nowhere, where a copy of imagenet-1k should be.*JPEG"
        ):
            load("imagenet-1k", tmp_path / "nowhere", "val")
        with pytest.raises(DataError, match="there is no folder .*train"):
            load("imagenet-1k", tmp_path, "train")

    def test_archives_that_were_not_unpacked(self, tmp_path):
        root = imagenet(tmp_path, THREE)
        (root / "train" / "n01440764.tar").touch()
        with pytest.raises(DataError, match=r"contains archives \(n01440764.tar\): unpack each"):
            load("imagenet-1k", root, "train")

    def test_images_that_were_not_sorted(self, tmp_path):
        picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
        with pytest.raises(
            DataError, match=r"contains 1 images outside the class folders \(ILSVRC2012_val_00000001.JPEG\)"
        ):
            load("imagenet-1k", tmp_path, "val")

    def test_folder_that_is_no_class(self, tmp_path):
        root = imagenet(tmp_path, THREE)
        (root / "val" / "tench").mkdir()
        with pytest.raises(DataError, match=r"not a class of the set \(tench\): move them away"):
            load("imagenet-1k", root, "val")

    def test_empty_class(self, tmp_path):
        root = imagenet(tmp_path, THREE)
        (root / "val" / imagenet_classes()[7]).mkdir()
        with pytest.raises(DataError, match="has no images"):
            load("imagenet-1k", root, "val")


class TestRenditions:
    def test_labels_meet_those_of_imagenet(self, tmp_path):
        data = load("imagenet-r", renditions(tmp_path, THREE))
        mapped = data.relabel(imagenet_classes())
        assert mapped.labels.tolist() == [imagenet_classes().index(wnid) for wnid in THREE for _ in range(2)]
        assert mapped.possible.tolist() == sorted(set(mapped.labels.tolist()))

    def test_all_200(self, tmp_path):
        data = load("imagenet-r", renditions(tmp_path, imagenet_classes("r"), per_class=1))
        assert len(data.relabel(imagenet_classes()).possible) == 200 and data.possible is None

    def test_tiny(self, tmp_path):
        data = load("tiny-imagenet-r", renditions(tmp_path, SHARED, per_class=1))
        assert len(data) == 62 and data.images[0].size == (20, 10)
        assert len(data.relabel(imagenet_classes("tiny")).possible) == 62

    def test_tiny_from_a_copy_of_imagenet_r(self, tmp_path):
        data = load("tiny-imagenet-r", renditions(tmp_path, imagenet_classes("r"), per_class=1))
        assert data.class_names == SHARED and {data.images[index].size for index in range(62)} == {(64, 64)}
        assert data.images[1:3][0].size == (64, 64)

    def test_a_model_without_these_classes(self, tmp_path):
        data = load("imagenet-r", renditions(tmp_path, imagenet_classes("r"), per_class=1))
        with pytest.raises(DataError, match="the model was trained without the classes"):
            data.relabel(imagenet_classes("tiny"))


class TestTinyImageNet:
    def test_train(self, tmp_path):
        data = load("tiny-imagenet", tiny_imagenet(tmp_path, THREE), "train")
        assert class_counts(data) == dict.fromkeys(THREE, 2) and "images" in data.names[0]

    def test_annotated_validation(self, tmp_path):
        data = load("tiny-imagenet", tiny_imagenet(tmp_path / "tiny-imagenet-200", THREE), "val")
        root = load("tiny-imagenet", tmp_path, "val")
        assert class_counts(data) == class_counts(root) == dict.fromkeys(THREE, 2)
        colours = [np.asarray(image)[0, 0, 0] for image in data.images]
        assert np.allclose(colours, data.labels, atol=3)  # the red of each image is the number of its class

    @pytest.mark.parametrize("inner", ["", "images"])
    def test_sorted_validation(self, tmp_path, inner):
        root = tiny_imagenet(tmp_path, THREE)
        (root / "val" / "val_annotations.txt").unlink()
        for wnid in THREE:
            picture(root / "val" / wnid / inner / "val_0.JPEG")
        (root / "val" / "images").rename(tmp_path / "gone")
        assert class_counts(load("tiny-imagenet", root, "val")) == dict.fromkeys(THREE, 1)

    def test_missing_annotations(self, tmp_path):
        root = tiny_imagenet(tmp_path, THREE)
        (root / "val" / "val_annotations.txt").unlink()
        with pytest.raises(DataError, match=r"there is no file .*val_annotations.txt.*train/nXXXXXXXX"):
            load("tiny-imagenet", root, "val")

    def test_missing_images(self, tmp_path):
        root = tiny_imagenet(tmp_path, THREE)
        (root / "val" / "images" / "val_3.JPEG").unlink()
        with pytest.raises(DataError, match=r"lacks 1 of the images of val_annotations.txt \(val_3.JPEG\)"):
            load("tiny-imagenet", root, "val", partial=False)
        assert len(load("tiny-imagenet", root, "val")) == 5

    def test_unknown_class(self, tmp_path):
        root = tiny_imagenet(tmp_path, THREE)
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1")
        with pytest.raises(DataError, match="n99999999, which is not a class of Tiny-ImageNet"):
            load("tiny-imagenet", root, "val")


class TestCub:
    def test_splits(self, tmp_path):
        train, test = (load("cub-200", cub(tmp_path), split) for split in ("train", "test"))
        assert set(train.names).isdisjoint(test.names) and len(train) == len(test) == 6
        assert class_counts(train) == {f"{label:03d}.Bird_{label}": 2 for label in (1, 2, 3)}
        assert Path(train.names[0]).parent.name == train.class_names[train.labels[0]]

    def test_missing_image(self, tmp_path):
        root = cub(tmp_path)
        (root / "images" / "002.Bird_2" / "Bird_2_1.jpg").unlink()
        with pytest.raises(DataError, match=r"lacks 1 of the images of images.txt \(002.Bird_2/Bird_2_1.jpg\)"):
            load("cub-200", root, "train", partial=False)

    def test_missing_list(self, tmp_path):
        root = cub(tmp_path)
        (root / "train_test_split.txt").unlink()
        with pytest.raises(DataError, match=r"cub-200: there is no file .*train_test_split.txt"):
            load("cub-200", root, "train")

    def test_lists_of_different_length(self, tmp_path):
        root = cub(tmp_path)
        (root / "train_test_split.txt").write_text("1 0")
        with pytest.raises(DataError, match="list 12, 12 and 1 images"):
            load("cub-200", root, "train")
