import logging

import pytest

from m2mkd.data import DataConfig, DataError, ImageDataset, load_images


@pytest.fixture
def folder(make_folder):
    root = make_folder({"ant": 5, "bee": 5})
    (root / "bee" / "001.png").write_bytes((root / "bee" / "001.png").read_bytes()[:60])
    return root


def load(folder, share):
    return load_images(DataConfig(source=f"imagefolder:{folder}", max_corrupt_share=share))


class TestWithoutCorrupt:
    def test_counted_named_and_left_out(self, folder, caplog):
        with caplog.at_level(logging.WARNING):
            data = load(folder, 0.1)
        assert len(data) == 9 and not any(name.endswith("bee/001.png") for name in data.names)
        assert "bee/001.png" in caplog.text and "1 of 10 images are corrupt and left out" in caplog.text

    def test_more_than_allowed(self, folder):
        with pytest.raises(DataError, match=r"1 of 10 images are corrupt, more than max_corrupt_share=0.05.*001.png"):
            load(folder, 0.05)

    def test_by_default_the_first_one_is_an_error_that_names_it(self, folder):
        dataset = ImageDataset(load(folder, 0.0), DataConfig(source="x", image_size=8), train=False)
        with pytest.raises(DataError, match=r"cannot decode the image .*bee/001.png"):
            list(dataset)

    def test_a_clean_set_is_untouched(self, make_folder, caplog):
        assert len(load(make_folder({"ant": 3}), 0.5)) == 3 and not caplog.records
