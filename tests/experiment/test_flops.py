"""FLOPs of a training step, counted on the trainer itself."""

import pytest
import torch
from testing_utils import NoiseImages, distillation_trainer, vit
from torch import nn

from m2mkd.experiment.flops import count_parameters, training_flops_per_image


# See tests/experiment/plan/test_step_cost.py: a layer of vit() and its head, and its embeddings.
LAYERS_AND_HEAD, EMBEDDINGS = 3 * 10 * (4 * 144 + 2 * 5 * 12 + 2 * 240) + 2 * 12 * 5, 2 * 4 * 48 * 12
PLAIN = {"student_depths": [3], "teacher_depths": None, "meta_depths": None, "alpha": 0.0, "stitch": "none"}


@pytest.fixture
def trainer(tmp_path):
    return distillation_trainer(tmp_path, vit(), teacher=None, meta=None, **PLAIN)


def test_forward_and_backward_of_one_image(trainer) -> None:
    assert training_flops_per_image(trainer, [trainer.student]) == 3 * LAYERS_AND_HEAD + 2 * EMBEDDINGS


def test_one_image_is_enough(tmp_path) -> None:
    trainer = distillation_trainer(
        tmp_path, vit(), teacher=None, meta=None, train_dataset=NoiseImages(count=1), **PLAIN
    )
    assert training_flops_per_image(trainer, [trainer.student]) == 3 * LAYERS_AND_HEAD + 2 * EMBEDDINGS


def test_nothing_of_it_stays(trainer) -> None:
    before = (trainer.student.config._attn_implementation, trainer.student.config._experts_implementation)
    trainer.model.train()
    state = torch.get_rng_state()
    training_flops_per_image(trainer, [trainer.student])
    assert (trainer.student.config._attn_implementation, trainer.student.config._experts_implementation) == before
    assert trainer.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_tensor_that_two_modules_share_counts_once() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 12 + 2 * 4
