"""The paper's augmentation through the trainer: mixed images, soft targets, repeated samples."""

from io import BytesIO

import datasets
import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from testing_utils import NUM_LABELS, assert_equal, distillation_trainer, meta_model, snapshot, vmoe
from transformers import TrainerCallback

from m2mkd.data import DataConfig, ImageDataset, LabeledImages, RepeatedSampler
from m2mkd.data.streaming import StreamedImages
from m2mkd.trainer.callbacks import DataEpoch


CONFIG = DataConfig(source="x", image_size=8, augmentation="imagenet")


def photos(train: bool = True, **changes) -> ImageDataset:
    """Twelve noise images of five classes, augmented as in the paper."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)) for _ in range(12)]
    labels = np.arange(12, dtype=np.int64) % NUM_LABELS
    data = LabeledImages(images, labels, list("abcde"), [str(index) for index in range(12)])
    return ImageDataset(data, CONFIG.model_copy(update=changes), train=train)


def stream() -> StreamedImages:
    """Twelve noise images from a stream of two files, augmented as in the paper."""

    def generate(files):
        for file in files:
            for index in file:
                noise = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
                buffer = BytesIO()
                Image.fromarray(noise).save(buffer, "PNG")
                yield {"image": {"bytes": buffer.getvalue(), "path": None}, "label": index % NUM_LABELS}

    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    files = {"files": [list(range(5)), list(range(5, 12))]}
    rows = datasets.IterableDataset.from_generator(generate, features=features, gen_kwargs=files)
    labels = {index: index for index in range(NUM_LABELS)}
    return StreamedImages(rows, 12, labels, list("abcde"), CONFIG.model_copy(update={"repeated": 2}), train=True)


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


class TestLoss:
    @pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "plain"])
    def test_soft_targets_and_the_teacher_on_the_same_mixed_images(self, tmp_path, pairs):
        cut = {} if pairs else {"student_depths": None, "teacher_depths": None, "meta": None}
        trainer = distillation_trainer(tmp_path, train_dataset=photos(), label_smoothing_factor=0.1, **cut)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["labels"].shape == (4, NUM_LABELS)
        loss = trainer.compute_loss(trainer.model.eval(), batch)
        inputs, teachers = trainer.frozen.inputs_and_targets(batch, trainer.args.pair_indices)
        expected = 0.0
        for name, (hidden_states, balance) in trainer.model(inputs, seed=None).items():
            index = int(name)
            student, teacher = trainer.frozen.suffix(hidden_states, index), teachers[index]
            smooth = batch["labels"] * 0.9 + 0.1 / NUM_LABELS
            cross_entropy = -(smooth * student.log_softmax(dim=-1)).sum(dim=-1).mean()
            student, teacher = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
            divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            expected += (0.5 * cross_entropy + 0.5 * divergence + balance.get("aux_loss", 0.0)).item()
        assert loss.item() == pytest.approx(expected, rel=1e-4)


class TestTraining:
    SETTINGS = {"per_device_train_batch_size": 3, "max_steps": 7, "save_strategy": "steps", "save_steps": 5}

    def trainer(self, folder, train_dataset: ImageDataset | StreamedImages, **overrides):
        callbacks = [DataEpoch(train_dataset), *overrides.pop("callbacks", [])]
        settings = {**self.SETTINGS, **overrides}
        return distillation_trainer(folder, train_dataset=train_dataset, callbacks=callbacks, **settings)

    def test_the_sampler_is_ours(self, tmp_path):
        trainer = self.trainer(tmp_path, photos())
        sampler = trainer._get_train_sampler()
        assert isinstance(sampler, RepeatedSampler) and sampler.batch_size == 3
        assert not isinstance(self.trainer(tmp_path, photos(repeated=1))._get_train_sampler(), RepeatedSampler)

    def test_evaluation_has_plain_labels(self, tmp_path):
        trainer = self.trainer(tmp_path, photos(), eval_dataset=photos(train=False))
        assert next(iter(trainer.get_eval_dataloader()))["labels"].ndim == 1
        assert 0 <= trainer.evaluate()["eval_pair_0_accuracy"] <= 1

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_resumed_run_sees_the_same_images(self, tmp_path, workers):
        # four steps an epoch: the checkpoint is in the middle of the second
        settings = {"dataloader_num_workers": workers}
        whole = self.trainer(tmp_path / "whole", photos(), **settings)
        whole.train()
        self.trainer(tmp_path / "cut", photos(), callbacks=[StopAfter(5)], **settings).train()
        resumed = self.trainer(tmp_path / "cut", photos(), model=vmoe(seed=9), **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 7
        assert_equal(snapshot(resumed.model), snapshot(whole.model))
        assert all(0 <= log["pair_0_accuracy"] <= 1 for log in whole.state.log_history if "pair_0_accuracy" in log)

    def test_a_resumed_stream_goes_on_with_the_same_images(self, tmp_path):
        whole = self.trainer(tmp_path / "whole", stream())
        whole.train()
        self.trainer(tmp_path / "cut", stream(), callbacks=[StopAfter(5)]).train()
        resumed = self.trainer(tmp_path / "cut", stream(), model=vmoe(seed=9))
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 7
        assert_equal(snapshot(resumed.model), snapshot(whole.model))

    def test_hard_distillation(self, tmp_path):
        trainer = self.trainer(tmp_path, photos(), distillation_type="hard", meta=meta_model(), save_strategy="no")
        assert np.isfinite(trainer.train().training_loss)
