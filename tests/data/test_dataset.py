import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from m2mkd.data import (
    DataConfig,
    DataError,
    ImageDataset,
    build_image_processor,
    random_affine,
    random_resized_crop_flip,
)
from m2mkd.data.mixing import random_erasing
from m2mkd.data.processing import PixelTransform
from m2mkd.data.rand_augment import rand_augment


CONFIG = DataConfig(source="x", image_size=16, augmentation="affine")


def everything(dataset, **options):
    """Pixels of one whole pass, (n, 3, side, side)."""
    return torch.cat([batch["pixel_values"] for batch in DataLoader(dataset, batch_size=5, **options)])


class TestSamples:
    def test_evaluation_is_the_image_processor(self, noise_data):
        dataset = ImageDataset(noise_data, CONFIG, train=False)
        processor = build_image_processor(CONFIG)
        for index, image in enumerate(noise_data.images):
            expected = processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(dataset[index]["pixel_values"], expected)

    def test_batch(self, noise_data):
        batch = next(iter(DataLoader(ImageDataset(noise_data, CONFIG, train=True), batch_size=4)))
        assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
        assert batch["labels"].tolist() == [0, 1, 2, 0] and batch["labels"].dtype == torch.long

    def test_ends_and_negative_index(self, noise_data):
        dataset = ImageDataset(noise_data, CONFIG, train=True)
        assert len(list(dataset)) == len(dataset) == 12
        assert torch.equal(dataset[-1]["pixel_values"], dataset[11]["pixel_values"])
        for index in (12, -13):
            with pytest.raises(IndexError, match=str(index)):
                dataset[index]

    @pytest.mark.parametrize("augmentation", ["none", "affine", "crop_flip", "imagenet"])
    def test_every_augmentation(self, noise_data, augmentation):
        config = CONFIG.model_copy(update={"augmentation": augmentation})
        train, plain = (
            everything(ImageDataset(noise_data, config, True)),
            everything(ImageDataset(noise_data, config, False)),
        )
        assert train.shape == plain.shape
        assert torch.equal(train, plain) == (augmentation == "none")


class TestDeterminism:
    def test_is_the_function_it_says(self, noise_data):
        dataset = ImageDataset(noise_data, CONFIG, train=True, seed=3)
        dataset.set_epoch(2)
        image = random_affine(noise_data.images[7], np.random.default_rng((3, 2, 7)))
        assert torch.equal(dataset[7]["pixel_values"], PixelTransform(CONFIG)(image))

    def test_seed_epoch_and_index_matter(self, noise_data):
        same = noise_data.select([0, 0])
        first = ImageDataset(same, CONFIG, train=True, seed=0)
        other_seed = ImageDataset(same, CONFIG, train=True, seed=1)
        before = first[0]["pixel_values"]
        assert not torch.equal(before, other_seed[0]["pixel_values"])
        assert not torch.equal(before, first[1]["pixel_values"])
        first.set_epoch(1)
        assert not torch.equal(before, first[0]["pixel_values"])
        first.set_epoch(0)
        assert torch.equal(before, first[0]["pixel_values"])

    def test_order_and_workers_do_not_matter(self, noise_data):
        dataset = ImageDataset(noise_data, CONFIG, train=True)
        straight = everything(dataset)
        assert torch.equal(straight, everything(dataset, num_workers=2))
        order = [5, 0, 11, 3, 8, 1, 2, 10, 4, 9, 7, 6]
        assert torch.equal(straight[order], everything(dataset, sampler=order))

    def test_negative_values(self, noise_data):
        with pytest.raises(ValueError, match="seed=-1"):
            ImageDataset(noise_data, CONFIG, train=True, seed=-1)
        with pytest.raises(ValueError, match="epoch=-1"):
            ImageDataset(noise_data, CONFIG, train=True).set_epoch(-1)


class TestEpoch:
    @pytest.mark.parametrize("context", ["fork", "spawn"])
    def test_reaches_persistent_workers(self, noise_data, context):
        dataset = ImageDataset(noise_data, CONFIG, train=True)
        loader = DataLoader(
            dataset, batch_size=12, num_workers=1, persistent_workers=True, multiprocessing_context=context
        )
        for epoch in (0, 3):
            dataset.set_epoch(epoch)
            expected = everything(dataset)
            assert torch.equal(next(iter(loader))["pixel_values"], expected)
        dataset.set_epoch(0)
        assert not torch.equal(everything(dataset), expected)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
    def test_a_copy_has_its_own_shared_epoch(self, noise_data, clone):
        dataset = ImageDataset(noise_data, CONFIG, train=True)
        dataset.set_epoch(4)
        twin = clone(dataset)
        assert twin.epoch == 4 and twin._epoch.is_shared()
        twin.set_epoch(5)
        assert dataset.epoch == 4
        assert torch.equal(everything(twin, num_workers=1), everything(twin))

    def test_shallow_copy_shares_the_epoch(self, noise_data):
        dataset = ImageDataset(noise_data, CONFIG, train=True)
        copy.copy(dataset).set_epoch(6)
        assert dataset.epoch == 6


class TestViews:
    def test_the_epochs_use_them_in_turn(self, noise_data):
        new, views = (ImageDataset(noise_data, CONFIG.model_copy(update={"views": k}), True) for k in (None, 2))
        for epoch, view in enumerate([0, 1, 0, 1]):
            new.set_epoch(view)
            views.set_epoch(epoch)
            assert torch.equal(everything(views), everything(new))

    def test_the_fingerprint_tells_other_views_apart(self, noise_data):
        def fingerprint(data=noise_data, seed=0, **changes):
            return ImageDataset(data, CONFIG.model_copy(update=changes), True, seed).fingerprint()

        others = [
            fingerprint(seed=1),
            fingerprint(views=2),
            fingerprint(image_size=8),
            fingerprint(noise_data.select([1, 0, *range(2, 12)])),
            fingerprint(noise_data.select(range(11))),
        ]
        assert fingerprint() == fingerprint()
        assert all(other != fingerprint() for other in others)

    def test_how_many_are_fixed(self):
        assert DataConfig(source="x").fixed_views() == 1
        assert DataConfig(source="x", views=3).fixed_views() == 1  # without augmentation, all are the same
        assert DataConfig(source="x", augmentation="affine", views=3).fixed_views() == 3

    @pytest.mark.parametrize(
        "config, words",
        [
            ({"augmentation": "crop_flip"}, "set views to the number"),
            ({"random_erasing": 0.1}, "set views to the number"),
            ({"mixup": 0.8, "views": 2}, "mixup=0.8 .* set mixup to 0.0"),
            ({"cutmix": 1.0, "views": 2}, "set cutmix to 0.0"),
            ({"repeated": 3, "views": 2}, "set repeated to 1"),
            ({"source": "user/set", "streaming": True}, "set streaming to false"),
        ],
    )
    def test_new_samples_in_each_epoch_have_no_fixed_views(self, config, words):
        with pytest.raises(DataError, match=words):
            DataConfig(**{"source": "x", **config}).fixed_views()


class TestMixing:
    CONFIG = DataConfig(source="x", image_size=16, mixup=0.8, cutmix=1.0, repeated=3)

    def test_batches_are_mixed_and_single_samples_are_not(self, noise_data):
        dataset = ImageDataset(noise_data, self.CONFIG, train=True)
        assert dataset[0]["labels"] == 0
        batch = next(iter(DataLoader(dataset, batch_size=4)))
        assert batch["labels"].shape == (4, 3) and batch["labels"].sum(dim=1).tolist() == pytest.approx([1.0] * 4)

    def test_evaluation_is_not_mixed(self, noise_data):
        batch = next(iter(DataLoader(ImageDataset(noise_data, self.CONFIG, train=False), batch_size=4)))
        assert batch["labels"].tolist() == [0, 1, 2, 0]

    def test_workers_do_not_matter_but_seed_and_epoch_do(self, noise_data):
        dataset = ImageDataset(noise_data, self.CONFIG, train=True)
        straight = everything(dataset)
        assert torch.equal(straight, everything(dataset, num_workers=2))
        assert not torch.equal(straight, everything(ImageDataset(noise_data, self.CONFIG, train=True, seed=1)))
        dataset.set_epoch(1)
        assert not torch.equal(straight, everything(dataset))

    def test_repeats_are_augmented_anew(self, noise_data):
        dataset = ImageDataset(noise_data, CONFIG, train=True)
        copies = [dataset[5, repeat]["pixel_values"] for repeat in range(3)]
        assert torch.equal(copies[0], dataset[5]["pixel_values"])
        assert not torch.equal(copies[0], copies[1]) and not torch.equal(copies[1], copies[2])
        with pytest.raises(IndexError, match="index 12"):
            dataset[12, 1]


class TestPaperAugmentation:
    def test_order_of_the_steps(self, noise_data):
        config = DataConfig(source="x", image_size=16, mean=(0.4, 0.5, 0.6), augmentation="imagenet", random_erasing=1)
        rng = np.random.default_rng((3, 0, 7))
        bicubic = Image.Resampling.BICUBIC
        image = random_resized_crop_flip(noise_data.images[7], 16, bicubic, rng, (0.08, 1.0))
        image = rand_augment(image, bicubic, (102, 128, 153), rng)
        expected = random_erasing(PixelTransform(config)(image), 1.0, rng)
        dataset = ImageDataset(noise_data, config, train=True, seed=3)
        assert torch.equal(dataset[7]["pixel_values"], expected)

    def test_the_centre_is_cut_out_of_what_is_not_cropped_yet(self, noise_data):
        config = DataConfig(source="x", image_size=16, center_crop=0.5, augmentation="crop_flip")
        plain = config.model_copy(update={"center_crop": None})
        crops, whole = (everything(ImageDataset(noise_data, each, train=True)) for each in (config, plain))
        assert torch.equal(crops, whole)
        crops, whole = (everything(ImageDataset(noise_data, each, train=False)) for each in (config, plain))
        assert not torch.equal(crops, whole)
