"""Stitches in closed form."""

import numpy as np
import torch
from testing_utils import images, vit, vmoe
from transformers import DeiTConfig, DeiTForImageClassification

from m2mkd import split_into_stages
from m2mkd.distillation.frozen_networks import TeacherContext
from m2mkd.distillation.stitch_init import fit_stitches
from m2mkd.distillation.stitched_student import StitchedStudent


DEPTHS, TEACHER_DEPTHS = [1, 2, 1], [1, 2, 2]
BATCH = {"pixel_values": images(40)}


def student(width: int, **options) -> StitchedStudent:
    model = vmoe()
    return StitchedStudent(model, split_into_stages(model, DEPTHS), width, **options)


def test_they_are_the_best_linear_maps_from_the_features_of_the_stages() -> None:
    teacher, pixel_values = split_into_stages(vit(seed=2, num_hidden_layers=5), TEACHER_DEPTHS), images(40)
    frozen, ours = TeacherContext(teacher, [0, 1, 2]), student(12)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    fit_stitches(ours, frozen, [{"pixel_values": part} for part in pixel_values.split(16)])
    inputs, targets = frozen.boundaries({"pixel_values": pixel_values}, [0, 1, 2])
    for index in (0, 1):
        pair = ours.pairs[str(index)]
        pair.eval()
        features = pair.post.layernorm(pair.run(inputs[index])[0]).detach().flatten(end_dim=1).numpy()
        design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        solution, *_ = np.linalg.lstsq(design, targets[index].flatten(end_dim=1).numpy(), rcond=1e-6)
        best = np.square(design @ solution - targets[index].flatten(end_dim=1).numpy()).mean()
        found = (pair(inputs[index])[0] - targets[index]).square().mean().item()
        assert found <= best * 1.001
    changed = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"pairs.{index}.post.linear.{part}" for index in (0, 1) for part in ("weight", "bias")}
    assert ours.training


def test_the_distillation_token_of_a_deit_is_left_out_of_the_fit() -> None:
    sizes = {"hidden_size": 12, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 20}
    deit = DeiTForImageClassification(DeiTConfig(**sizes, image_size=8, patch_size=4, num_labels=5)).eval()
    frozen = TeacherContext(split_into_stages(deit, TEACHER_DEPTHS), [0, 1, 2])
    ours = student(12, special_tokens=2)
    fit_stitches(ours, frozen, [BATCH])
    inputs, targets = frozen.boundaries(BATCH, [0])
    kept = [0, *range(2, 6)]
    fitted = (ours.pairs["0"](inputs[0])[0] - targets[0])[:, kept].square().mean()
    assert fitted < 0.8 * (targets[0][:, kept] - targets[0][:, kept].mean(dim=(0, 1))).square().mean()


def test_fed_by_itself_each_stage_is_fitted_behind_the_others() -> None:
    frozen = TeacherContext(split_into_stages(vit(seed=2, num_hidden_layers=5), TEACHER_DEPTHS), [0, 1, 2])
    ours = student(12, feed="student")
    fit_stitches(ours, frozen, [BATCH])
    outputs, (_, targets) = ours({0: images(40)}), frozen.boundaries(BATCH, [0, 1, 2])
    for index in (0, 1):
        spread = (targets[index] - targets[index].mean(dim=(0, 1))).square().mean()
        assert (outputs[str(index)][0] - targets[index]).square().mean() < spread
