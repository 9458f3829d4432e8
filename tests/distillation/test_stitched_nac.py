"""Distilled stages of a NAC between their stitches; parity with the official students and losses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from official_cases import FOLDER, Case, assert_close, assert_gradients_close, vit, vit_stage

from m2mkd import NACConfig, NACForImageClassification, split_into_stages
from m2mkd.conversion.official_nac import convert_nac_student, nac_students_config
from m2mkd.distillation.frozen_networks import FrozenNetworks
from m2mkd.distillation.losses import hard_distillation_loss, per_sample_cross_entropy, soft_distillation_loss
from m2mkd.distillation.pair_folder import load_stage, load_stitches, save_pair
from m2mkd.distillation.stitched_nac import StitchedNACStage
from m2mkd.distillation.stitched_student import StitchedStudent


SHARED = Path(__file__).parents[3] / "shared" / "fixtures"
INDEX = {"readin": 0, "mediator": 1, "readout": 2}
FIXED = ("latent_codes", "latent_states", "token_codes")
STITCH_SIZE = 40


def official_case(name: str) -> Case:
    if not (FOLDER / name).is_dir() and not (SHARED / name).is_dir():
        pytest.skip(f"the official case {name} is not committed, and there are no fixtures beside the repository")
    return Case(name if (FOLDER / name).is_dir() else str(SHARED / name))


def student_names(official: dict[str, torch.Tensor], role: str) -> dict[str, torch.Tensor]:
    stage, stitches = convert_nac_student(official, INDEX[role], len(INDEX))
    return {**{f"stage.{name}": tensor for name, tensor in stage.items()}, **stitches}


def official_student(spec: dict[str, Any], case: Case) -> StitchedNACStage:
    role = spec["role"]
    sizes = {"num_hidden_layers": 1, "num_input_latents": 4, "num_mediator_latents": 6, "num_output_latents": 4}
    config = nac_students_config(spec["share_kwargs"], {role: spec["role_kwargs"]}, **sizes)
    stage = split_into_stages(NACForImageClassification(config), [1, 1, 1])[INDEX[role]]
    pair = StitchedNACStage(stage, spec["stitch_dim"]).train()
    kept = {name: tensor for name, tensor in pair.state_dict().items() if name in FIXED}
    pair.load_state_dict({**student_names(case.state_dict, role), **kept}, strict=True)
    inputs = case.inputs
    codes = inputs.get("codes", inputs.get("receiver_codes"))
    if pair.latent_codes is not None:
        pair.latent_codes = codes
        # the official code has a state for each image of the batch
        pair.latent_states = inputs.get("states", inputs.get("receiver_states"))
    if pair.token_codes is not None:
        pair.token_codes = codes.expand_as(pair.token_codes)
    return pair


def without_noise(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Confidences of a single output latent: their exact gradient is zero."""
    return {name: tensor for name, tensor in gradients.items() if "confidence" not in name}


@pytest.mark.parametrize("role", INDEX)
def test_official_student(role: str) -> None:
    case = official_case(f"nac_student_{role}")
    pair = official_student(case.config, case)
    output, auxiliary = pair(case.inputs["pixel_values" if role == "readin" else "meta_states"])
    assert auxiliary == {}
    assert_close(output, case.outputs["noisy.output"], "output")
    (output * case.inputs["probe"]).sum().backward()
    official = without_noise(student_names(case.gradients(), role))
    assert_gradients_close(without_noise(dict(pair.named_parameters())), official)


@pytest.mark.parametrize("role", INDEX)
def test_official_losses(role: str) -> None:
    case = official_case({"readin": "m2mkd_nac_0", "mediator": "m2mkd_nac_1", "readout": "m2mkd_nac_last"}[role])
    config, index = case.config, INDEX[role]
    pair = official_student(config["student"], case)
    meta = vit(config["meta"], config["meta"]["norm_eps"], case.meta_state_dict)
    teacher = vit_stage(config["teacher"], config["teacher"]["norm_eps"], index, case.teacher_block_state_dict)
    frozen = FrozenNetworks(split_into_stages(meta, [1, 1, 1]), {index: teacher})
    inputs, targets = frozen.inputs_and_targets(case.inputs, [index])
    teacher_logits = targets[index]
    assert_close(teacher_logits, case.outputs["teacher_outputs"], "teacher")
    for name, settings in config["distillation"].items():
        pair.zero_grad()
        logits = frozen.suffix(pair(inputs[index])[0], index)
        assert_close(logits, case.outputs["student_outputs"], "student")
        loss = per_sample_cross_entropy(logits, case.inputs["soft_targets"]).mean()
        if settings["type"] == "hard":
            distillation = hard_distillation_loss(logits, teacher_logits)
        else:
            distillation = soft_distillation_loss(logits, teacher_logits, settings["tau"], "mean")
        alpha = settings["alpha_teacher"]
        loss = (1 - alpha) * loss + alpha * distillation
        assert_close(loss, case.outputs[f"{name}.loss"], name)
        official = case.gradients(f"{name}.grad.")
        if official:
            loss.backward()
            ours = without_noise(dict(pair.named_parameters()))
            assert_gradients_close(ours, without_noise(student_names(official, role)))


# ---- What stands in for the latents ----


def circuit(seed: int = 0, **fields: object) -> NACForImageClassification:
    torch.manual_seed(seed)
    return NACForImageClassification(NACConfig.from_preset("tiny", num_labels=10, **fields))


def student_of(model: NACForImageClassification, seed: int = 3, **options: str) -> StitchedStudent:
    stages = split_into_stages(model, [1, 1, 1, 1])
    return StitchedStudent(model, stages, STITCH_SIZE, seed=seed, **options)


@pytest.fixture(params=["random", "own"])
def codes(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def inputs_of(batch_size: int, num_tokens: int = 17) -> dict[int, torch.Tensor]:
    tokens = torch.randn(batch_size, num_tokens, STITCH_SIZE)
    return {0: torch.randn(batch_size, 3, 32, 32), 1: tokens, 2: tokens, 3: tokens}


def test_buffers_depend_on_the_seed_alone(codes: str) -> None:
    first, second = (student_of(circuit(), nac_codes=codes) for _ in range(2))
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, second.get_buffer(name))
    trained = {name for name, _ in first.named_parameters()}
    assert not any(name.split(".")[-1] in FIXED for name in trained)
    if codes == "random":
        other = student_of(circuit(), seed=4).pairs["1"].token_codes
        assert not torch.equal(other, first.pairs["1"].token_codes)


@pytest.mark.parametrize(("read_in_latents", "num_tokens"), [("one", 1), ("all", 8)])
def test_tokens_of_the_read_in(codes: str, read_in_latents: str, num_tokens: int) -> None:
    student = student_of(circuit(), nac_codes=codes, read_in_latents=read_in_latents).eval()
    outputs = student(inputs_of(2))
    assert outputs["0"][0].shape == (2, num_tokens, STITCH_SIZE)
    assert outputs["1"][0].shape == outputs["2"][0].shape == (2, 17, STITCH_SIZE)
    assert outputs["3"][0].shape == (2, 10)


def test_own_codes_are_those_of_the_student() -> None:
    model = circuit()
    pairs = student_of(model, nac_codes="own", read_in_latents="all").pairs
    assert torch.equal(pairs["0"].latent_codes, model.nac.input_latents.codes)
    assert torch.equal(pairs["1"].token_codes[0], model.nac.mediator_latents.codes)
    assert torch.equal(pairs["3"].latent_codes, model.nac.output_latents.codes)
    model.eval()
    inputs, _, outputs = model.nac.seed(1)
    assert torch.equal(pairs["0"].latent_states, inputs)
    assert torch.equal(pairs["3"].latent_states, outputs)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(codes: str) -> None:
    student = student_of(circuit(), nac_codes=codes, read_in_latents="all").eval()
    batch = inputs_of(3)
    together = student(batch)
    alone = student({index: tensor[1:2] for index, tensor in batch.items()})
    for name in together:
        torch.testing.assert_close(together[name][0][1:2], alone[name][0], atol=1e-5, rtol=1e-5)


def test_own_codes_meet_other_tokens_in_every_step() -> None:
    pair = student_of(circuit(), nac_codes="own").pairs["1"].train()
    tokens = inputs_of(2)[1]
    torch.manual_seed(0)
    first = pair._codes_of_tokens(tokens)
    assert not torch.equal(first, pair._codes_of_tokens(tokens))
    pair.eval()
    assert torch.equal(pair._codes_of_tokens(tokens), pair._codes_of_tokens(tokens))


def test_every_trained_parameter_has_a_gradient(codes: str) -> None:
    student = student_of(circuit(), nac_codes=codes, read_in_latents="all").train()
    sum(output.square().sum() for output, _ in student(inputs_of(2), seed=0).values()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_round_trip_of_the_files(tmp_path: Path, codes: str) -> None:
    model = circuit()
    student = student_of(model, nac_codes=codes).eval()
    batch = inputs_of(2)
    expected = student(batch)
    for index, pair in student.pairs.items():
        save_pair(pair, tmp_path / index, STITCH_SIZE)
    other = circuit(seed=9)
    for stage in split_into_stages(other, [1, 1, 1, 1]):
        assert load_stage(stage, tmp_path / str(stage.index)) == []
    again = student_of(other, seed=11, nac_codes=codes).eval()
    for index, pair in again.pairs.items():
        load_stitches(pair, tmp_path / index)
    for index, (output, _) in again(batch).items():
        assert torch.equal(output, expected[index][0])
    # latents and kernels are not the pair's
    assert not torch.equal(other.nac.input_latents.codes, model.nac.input_latents.codes)
