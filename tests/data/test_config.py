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
            {"center_crop": 0.0},
            {"max_corrupt_share": 1.0},
            {"center_crop": 1.1},
            {"random_erasing": 1.5},
            {"mixup": -0.1},
            {"cutmix": float("inf")},
            {"repeated": 0},
            {"color_jitter": 0.4},
            {"source": ""},
        ],
    )
    def test_refuses(self, wrong):
        with pytest.raises(ValidationError):
            DataConfig(**{"source": "mnist5k", **wrong})

    def test_options_that_the_source_would_ignore(self):
        with pytest.raises(ValidationError, match="mixup=0.8 needs labels, which 'unlabeled:x' does not have"):
            DataConfig(source="unlabeled:x", mixup=0.8)
        with pytest.raises(ValidationError, match="source 'unlabeled:' has no path"):
            DataConfig(source="unlabeled:")
        with pytest.raises(ValidationError, match="holdout=0.2 is only for imagefolder"):
            DataConfig(source="mnist5k", holdout=0.2)
        with pytest.raises(ValidationError, match="config_name='full'"):
            DataConfig(source="uci_digits", config_name="full")
        with pytest.raises(ValidationError, match="has no path"):
            DataConfig(source="imagefolder:")
        with pytest.raises(ValidationError, match="has no path: write cifar10:PATH"):
            DataConfig(source="cifar10:")
        with pytest.raises(
            ValidationError, match="unknown name before the colon: use imagefolder or one of imagenet-1k, "
        ):
            DataConfig(source="tinyimagenet:x")
        with pytest.raises(ValidationError, match="partial is only for local copies"):
            DataConfig(source="cifar10", partial=True)

    def test_frozen(self):
        with pytest.raises(ValidationError):
            DataConfig(source="mnist5k").image_size = 3


class TestImagenetAugmentation:
    def test_official_values(self):
        config = DataConfig(source="x", augmentation="imagenet")
        assert (config.mixup, config.cutmix, config.random_erasing, config.repeated) == (0.8, 1.0, 0.25, 3)

    def test_the_recipe_wins(self):
        config = DataConfig(source="x", augmentation="imagenet", repeated=1, mixup=0.0)
        assert (config.mixup, config.cutmix, config.repeated) == (0.0, 1.0, 1)
        assert DataConfig(**config.model_dump()) == config

    def test_others_change_nothing(self):
        config = DataConfig(source="x", augmentation="crop_flip")
        assert (config.mixup, config.cutmix, config.random_erasing, config.repeated) == (0.0, 0.0, 0.0, 1)
