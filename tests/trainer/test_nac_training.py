"""Training of a NAC: as a whole, and module by module."""

import pytest
import torch
from testing_utils import assert_close, assert_equal, changed, distillation_trainer, nac, snapshot

from m2mkd import NACForImageClassification, split_into_stages


# one read-in, two rounds of messages in one stage, one read-out; meta model and teacher have three stages, too
DEPTHS = [1, 2, 1]
OPTIONS = [
    {},
    {"nac_codes": "own"},
    {"read_in_latents": "all"},
    {"nac_codes": "own", "read_in_latents": "all"},
]


def final_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in snapshot(trainer.model).items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_at_once_and_one_after_the_other_give_the_same_weights(tmp_path, options: dict) -> None:
    settings = {"student_depths": DEPTHS, "gradient_accumulation_steps": 2, "optim": "adamw_torch", **options}
    together = nac()
    trainer = distillation_trainer(tmp_path, together, **settings)
    trainer.train()
    expected = final_weights(trainer)
    apart, ours = nac(), {}
    for index in (2, 0, 1):
        trainer = distillation_trainer(tmp_path, apart, pairs=[index], **settings)
        trainer.train()
        ours |= final_weights(trainer)
    assert_equal(ours, expected)
    assert_equal(apart.state_dict(), together.state_dict())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distillation_leaves_latents_and_kernels_alone(tmp_path, options: dict) -> None:
    student = nac()
    before = snapshot(student)
    distilled = {
        name for stage in split_into_stages(student, DEPTHS) for name, _ in stage.distilled().named_parameters()
    }
    trainer = distillation_trainer(tmp_path, student, student_depths=DEPTHS, **options)
    trainer.train()
    moved = changed(student, before)
    assert moved <= distilled
    # one latent needs no confidence: the softmax of one element has no gradient; the tokenizer's is below round-off
    still = {name for name in distilled - moved if "confidence" not in name and "tokenizer" not in name}
    assert not still
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_stitches_are_linear_unless_asked_otherwise(tmp_path) -> None:
    pair = distillation_trainer(tmp_path, nac(), student_depths=DEPTHS).trained_pairs()[1]
    assert {name for name, _ in pair.pre.named_parameters()} == {"linear.weight", "linear.bias"}
    trainer = distillation_trainer(tmp_path, nac(), student_depths=DEPTHS, stitch="layernorm_linear")
    assert "layernorm.weight" in dict(trainer.trained_pairs()[1].pre.named_parameters())


def test_a_whole_circuit_is_trained_with_the_losses_of_its_graph(tmp_path) -> None:
    student = nac(signature_repulsion_coef=0.5)
    before = snapshot(student)
    whole = {"student_depths": None, "teacher_depths": None, "meta": None}
    trainer = distillation_trainer(tmp_path, student, **whole)
    trainer.train()
    assert {"aux_loss", "signature_repulsion_loss"} <= trainer.state.log_history[0].keys()
    moved = changed(student, before)
    assert {"nac.mediator_latents.signatures", "nac.layers.0.kernel.bandwidth", "nac.input_latents.codes"} <= moved
    trainer.save_model(tmp_path / "out")
    again = NACForImageClassification.from_pretrained(tmp_path / "out")
    assert_equal(again.state_dict(), student.state_dict())


def test_two_images_four_times_are_eight_images_once(tmp_path) -> None:
    # without noise: images of other batches would draw other edges
    quiet = {"code_noise_scale": 0.0, "drop_path_rate": 0.0, "pooling": "softmax"}
    settings = {"student_depths": DEPTHS, "max_steps": 2}
    once = distillation_trainer(tmp_path, nac(**quiet), per_device_train_batch_size=8, **settings)
    once.train()
    four_times = distillation_trainer(
        tmp_path, nac(**quiet), per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings
    )
    four_times.train()
    assert_close(final_weights(four_times), final_weights(once), atol=1e-6)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path) -> None:
    settings = {"student_depths": DEPTHS, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    settings |= {"nac_codes": "own", "lr_scheduler_type": "cosine"}
    whole = distillation_trainer(tmp_path / "whole", nac(), **settings)
    whole.train()
    resumed = distillation_trainer(tmp_path / "whole", nac(seed=9), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(final_weights(resumed), final_weights(whole))
