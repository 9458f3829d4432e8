import numpy as np
import pytest

from m2mkd.data import DataError, LabeledImages, class_counts


class TestSelect:
    def test_order_and_content(self, noise_data):
        part = noise_data.select([7, 2])
        assert part.labels.tolist() == [1, 2] and part.names == ["noise[7]", "noise[2]"]
        assert part.images[0] is noise_data.images[7]
        assert part.select(np.array([1])).images[0] is noise_data.images[2]
        assert [image.size for image in part.images] == [(27, 23), (22, 28)]

    def test_empty(self, noise_data):
        assert len(noise_data.select([])) == 0

    @pytest.mark.parametrize("index", [12, -1])
    def test_outside(self, noise_data, index):
        with pytest.raises(IndexError, match=str(index)):
            noise_data.select([index])


class TestRelabel:
    def test_by_name_and_not_by_number(self, noise_data):
        moved = noise_data.relabel(["cat", "dog", "ant", "bee"])
        assert moved.labels[:3].tolist() == [2, 3, 0]
        assert moved.class_names == ["cat", "dog", "ant", "bee"]

    def test_missing_classes_are_named(self, noise_data):
        with pytest.raises(DataError, match="without the classes bee, cat "):
            noise_data.relabel(["ant", "dog"])

    def test_a_class_without_samples_may_be_missing(self, noise_data):
        only_ants = noise_data.select(np.flatnonzero(noise_data.labels == 0))
        assert only_ants.relabel(["dog", "ant"]).labels.tolist() == [1, 1, 1, 1]


class TestChecks:
    def make(self, labels, class_names=("a", "b")):
        images = [None] * len(labels)
        return LabeledImages(images, np.array(labels), list(class_names), [f"x[{i}]" for i in range(len(labels))])

    def test_unlabelled_sample_is_named(self):
        with pytest.raises(DataError, match=r"x\[1\] has label -1"):
            self.make([0, -1])

    def test_label_beyond_the_classes(self):
        with pytest.raises(DataError, match=r"x\[2\] has label 2"):
            self.make([0, 1, 2])

    def test_repeated_class_name(self):
        with pytest.raises(DataError, match="repeated: a"):
            self.make([0], ["a", "b", "a"])

    def test_float_labels(self):
        with pytest.raises(DataError, match="float64"):
            self.make([0.0, 1.0])

    def test_lengths(self):
        with pytest.raises(DataError, match="1 images, 2 labels"):
            LabeledImages([None], np.array([0, 0]), ["a"], ["x"])

    def test_class_counts(self, noise_data):
        assert class_counts(noise_data.select([0, 3, 1])) == {"ant": 2, "bee": 1, "cat": 0}
