import pytest
from pydantic import ValidationError

from m2mkd.data import DataConfig


class TestDataConfig:
    def test_yaml_lists_become_tuples(self):
        config = DataConfig(source="mnist5k", mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
        assert config.mean == (0.1, 0.2, 0.3) and config.std == (1.0, 1.0, 1.0)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"holdout": 1.0, "source": "imagefolder:x"},
            {"holdout": -0.1, "source": "imagefolder:x"},
            {"image_size": 0},
            {"image_size": "28"},
            {"samples_per_class": 0},
            {"subset_seed": -1},
            {"std": [0.5, 0.0, 0.5]},
            {"mean": [0.5, 0.5]},
            {"mean": [0.5, float("nan"), 0.5]},
            {"resample": "nearest"},
            {"augmentation": "mixup"},
            {"imagesize": 28},
            {"source": ""},
        ],
    )
    def test_refuses(self, wrong):
        with pytest.raises(ValidationError):
            DataConfig(**{"source": "mnist5k", **wrong})

    def test_options_that_the_source_would_ignore(self):
        with pytest.raises(ValidationError, match="holdout=0.2 is for imagefolder"):
            DataConfig(source="mnist5k", holdout=0.2)
        with pytest.raises(ValidationError, match="config_name='full'"):
            DataConfig(source="uci_digits", config_name="full")
        with pytest.raises(ValidationError, match="has no path"):
            DataConfig(source="imagefolder:")

    def test_frozen(self):
        with pytest.raises(ValidationError):
            DataConfig(source="mnist5k").image_size = 3
