"""Distillation from stored targets: the same weights as with the teacher itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import (
    IMAGE_SIZE,
    NUM_LABELS,
    STUDENT_DEPTHS,
    TEACHER_DEPTHS,
    NoiseImages,
    assert_close,
    assert_equal,
    distillation_args,
    meta_model,
    nac,
    snapshot,
    teacher,
    vmoe,
)
from transformers import PreTrainedModel

from m2mkd import M2MKDTrainer, TargetCache
from m2mkd.data import DataConfig, ImageDataset, LabeledImages
from m2mkd.distillation.split import new_network
from m2mkd.errors import CacheError, DataError, StageError
from m2mkd.trainer.cached_images import CachedImages
from m2mkd.trainer.callbacks import DataEpoch


BOUNDARIES = {"context": "teacher", "match": "boundary"}
WHOLE = {"student_depths": None, "teacher_depths": None}


def dataset(seed: int = 0, count: int = 16, pixels: int = 0, **config: Any) -> ImageDataset:
    """Noise with two views of each image."""
    rng = np.random.default_rng(pixels)
    arrays = rng.integers(0, 256, size=(count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels, names = np.arange(count) % NUM_LABELS, [str(index) for index in range(count)]
    data = LabeledImages([Image.fromarray(array) for array in arrays], labels, list("abcde"), names)
    settings = {"augmentation": "affine", "views": 2, **config}
    settings = {"source": "x", "image_size": IMAGE_SIZE, **settings}
    return ImageDataset(data, DataConfig(**settings), train=True, seed=seed)


def write(folder: Path, dtype: str = "float32", images: ImageDataset | None = None, **options: Any) -> TargetCache:
    # in batches of the trainer's size: products of other shapes may round differently
    options = {"batch_size": 4, "say": lambda text: None, **options}
    return TargetCache.write(folder, teacher(), TEACHER_DEPTHS, images or dataset(), dtype, **options)


def trained(folder: Path, student: PreTrainedModel, **overrides: Any) -> dict[str, torch.Tensor]:
    """Weights after two epochs of four steps, each with another view."""
    own = {name: overrides.pop(name) for name in ("teacher", "targets") if name in overrides}
    args = distillation_args(folder / "out", **{"max_steps": 8, **overrides})
    trainer = M2MKDTrainer(student, args, train_dataset=dataset(), **own)
    trainer.add_callback(DataEpoch(trainer.train_dataset))
    trainer.train()
    return snapshot(trainer.model)


CASES = {
    "all pairs": BOUNDARIES,
    "first pair": {**BOUNDARIES, "pairs": [0]},
    "middle pair": {**BOUNDARIES, "pairs": [1]},
    "last pair": {**BOUNDARIES, "pairs": [2]},
    "fed by the student": {**BOUNDARIES, "feed": "student"},
    "no labels, fitted stitches": {**BOUNDARIES, "alpha": 1.0, "stitch_init": "least_squares"},
    "kd": WHOLE,
    "kd without labels": {**WHOLE, "alpha": 1.0},
}


class TestEquality:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("student, depths", [(vmoe, STUDENT_DEPTHS), (nac, [1, 2, 1])], ids=["V-MoE", "NAC"])
    def test_the_weights_are_those_of_a_training_with_the_teacher(
        self, tmp_path: Path, student: Any, depths: list[int], case: dict[str, Any]
    ) -> None:
        case = {"student_depths": depths, **case}
        expected = trained(tmp_path, student(), teacher=teacher(), **case)
        assert_equal(trained(tmp_path, student(), targets=write(tmp_path / "cache"), **case), expected)

    @pytest.mark.parametrize("dtype, atol", [("float16", 1e-3), ("bfloat16", 1e-2)])
    def test_in_half_precision_they_differ_by_its_rounding(self, tmp_path: Path, dtype: str, atol: float) -> None:
        expected = trained(tmp_path, vmoe(), teacher=teacher(), **BOUNDARIES)
        ours = trained(tmp_path, vmoe(), targets=write(tmp_path / "cache", dtype), **BOUNDARIES)
        assert_close(ours, expected, atol)
        assert any(not torch.equal(ours[name], expected[name]) for name in ours)

    def test_workers_read_the_view_of_the_epoch(self, tmp_path: Path) -> None:
        expected = trained(tmp_path, vmoe(), teacher=teacher(), **BOUNDARIES)
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        cache = write(tmp_path / "cache", num_workers=1)
        assert_equal(trained(tmp_path, vmoe(), targets=cache, **BOUNDARIES, **workers), expected)


class TestWhatIsRead:
    @staticmethod
    def trainer(folder: Path, **overrides: Any) -> M2MKDTrainer:
        args = distillation_args(folder / "out", **{**BOUNDARIES, **overrides})
        return M2MKDTrainer(vmoe(), args, targets=write(folder / "cache"), train_dataset=dataset())

    @pytest.mark.parametrize(
        "overrides, names",
        [
            ({"pairs": [0]}, {"pixel_values", "boundary_1"}),
            ({"pairs": [1]}, {"boundary_1", "boundary_2"}),
            ({"pairs": [2]}, {"boundary_2", "logits"}),
            ({"pairs": [0, 1], "feed": "student"}, {"pixel_values", "boundary_1", "boundary_2"}),
            (WHOLE, {"pixel_values", "logits"}),
        ],
    )
    def test_a_sample_has_what_the_pairs_of_this_process_need(
        self, tmp_path: Path, overrides: dict[str, Any], names: set[str]
    ) -> None:
        sample = self.trainer(tmp_path, **overrides).train_dataset[3]
        assert sample.keys() == {*names, "labels"}
        assert sample["labels"] == 3

    def test_the_teacher_is_not_there(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path)
        assert not list(trainer.frozen.parameters())
        assert trainer.network_hashes == {"teacher_sha256": TargetCache(tmp_path / "cache").teacher_sha256}

    def test_a_pair_needs_no_files_of_others_and_no_weights_of_other_stages(self, tmp_path: Path) -> None:
        cache = write(tmp_path / "cache")
        for path in [*cache.folder.glob("logits/*"), *cache.folder.glob("boundary_2/*")]:
            path.unlink()
        student = new_network(vmoe().config, STUDENT_DEPTHS, 0, [0])
        args = distillation_args(tmp_path / "out", **BOUNDARIES, pairs=[0])
        M2MKDTrainer(student, args, targets=cache, train_dataset=dataset()).train()
        with pytest.raises(CacheError, match="boundary_2.* is missing"):
            M2MKDTrainer(
                vmoe(),
                distillation_args(tmp_path / "out", **BOUNDARIES, pairs=[1]),
                targets=cache,
                train_dataset=dataset(),
            )


class TestRefused:
    @pytest.mark.parametrize(
        "overrides, given, words",
        [
            ({}, {"teacher": teacher}, "a teacher is given"),
            ({"context": "meta"}, {"meta": meta_model}, "a meta model is given"),
            ({}, {"eval_dataset": NoiseImages}, "`eval_dataset` is given"),
            ({"match": "logits"}, {}, "Set `context='teacher'` and `match='boundary'`"),
            ({"context": "meta"}, {}, "Set `context='teacher'` and `match='boundary'`"),
            ({**WHOLE, "alpha": 0.0}, {}, "`alpha` is 0"),
        ],
    )
    def test_what_a_cache_does_not_serve(
        self, tmp_path: Path, overrides: dict[str, Any], given: dict[str, Any], words: str
    ) -> None:
        args = distillation_args(tmp_path / "out", **{**BOUNDARIES, **overrides})
        networks = {name: build() for name, build in given.items()}
        with pytest.raises(StageError, match=words):
            M2MKDTrainer(vmoe(), args, targets=write(tmp_path / "cache"), train_dataset=dataset(), **networks)

    @pytest.mark.parametrize(
        "other, words",
        [
            (dataset(seed=1), "data.seed"),
            (dataset(views=3), "data.views"),
            (dataset(count=15), "data.images"),
            (dataset(pixels=1), "data.sha256"),
            (dataset(mean=(0.0, 0.0, 0.0)), "data.mean"),
        ],
    )
    def test_another_data_set(self, tmp_path: Path, other: ImageDataset, words: str) -> None:
        args = distillation_args(tmp_path / "out", **BOUNDARIES)
        with pytest.raises(CacheError, match=f"{words}.*write the cache again"):
            M2MKDTrainer(vmoe(), args, targets=write(tmp_path / "cache"), train_dataset=other)

    def test_a_set_that_is_no_image_dataset(self, tmp_path: Path) -> None:
        args = distillation_args(tmp_path / "out", **BOUNDARIES)
        with pytest.raises(DataError, match="NoiseImages.*`ImageDataset`"):
            M2MKDTrainer(vmoe(), args, targets=write(tmp_path / "cache"), train_dataset=NoiseImages())

    def test_a_teacher_cut_in_other_places(self, tmp_path: Path) -> None:
        args = distillation_args(tmp_path / "out", **BOUNDARIES, teacher_depths=[2, 1, 2])
        with pytest.raises(CacheError, match="another depths"):
            M2MKDTrainer(vmoe(), args, targets=write(tmp_path / "cache"), train_dataset=dataset())


class TestEvaluation:
    def test_a_whole_student_is_evaluated_by_the_labels(self, tmp_path: Path) -> None:
        args = distillation_args(tmp_path / "out", **WHOLE, alpha=1.0)
        networks = {"targets": write(tmp_path / "cache"), "train_dataset": dataset(), "eval_dataset": NoiseImages()}
        trainer = M2MKDTrainer(vmoe(), args, **networks)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_cross_entropy"], rel=1e-5)
        assert "eval_kl" not in metrics
        trainer.train()

    def test_a_batch_to_train_on_without_targets_is_refused(self, tmp_path: Path) -> None:
        args = distillation_args(tmp_path / "out", **WHOLE)
        trainer = M2MKDTrainer(vmoe(), args, targets=write(tmp_path / "cache"), train_dataset=dataset())
        trainer.train_dataset = NoiseImages()
        with pytest.raises(DataError, match="not logits"):
            trainer.train()


def test_images_without_labels_get_none_from_the_cache(tmp_path: Path) -> None:
    images = dataset(source="unlabeled:x")
    cached = CachedImages(images, write(tmp_path / "cache", images=images), ["boundary_1"])
    assert cached[3].keys() == {"boundary_1"}
