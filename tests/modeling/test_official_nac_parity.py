"""The NAC against the official code's own numbers; `test_stitched_nac.py` has its students and losses."""

import pytest
import torch
from official_cases import assert_close
from official_nac_cases import nac, nac_case, recorded_noise

from m2mkd.conversion.official_nac import convert_nac
from m2mkd.distillation.losses import per_sample_cross_entropy


EVAL_CASES = [
    "nac_small_eval",
    "nac_scale_free",
    "nac_planted",
    "nac_ring",
    "nac_erdos",
    "nac_scale_free_bias_vanilla",
]
# Gradients of the all-noise cases pass through images whose every branch was dropped.
TRAIN_CASES = {"nac_small_train": 1e-4, "nac_train": 1e-4, "nac_train_all_noise": 5e-4}
ATTENTION = ["eager", "sdpa"]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", EVAL_CASES)
@torch.no_grad()
def test_evaluation_is_the_official_one_without_its_noise(name: str, attention: str) -> None:
    case = nac_case(name)
    model = nac(case)
    model.set_attn_implementation(attention)
    outputs = model(case.inputs["pixel_values"], output_hidden_states=True)
    official = {k.removeprefix("noise_free."): v for k, v in case.outputs.items() if k.startswith("noise_free.")}
    assert_close(outputs.logits, official["logits"], "logits")
    num_inputs = model.config.num_input_latents
    if "read_in" in official:
        assert_close(outputs.hidden_states[0][:, :num_inputs], official["read_in"], "read-in")
    for layer, hidden_states in enumerate(outputs.hidden_states[1:]):
        if f"propagator.{layer}" in official:
            assert_close(hidden_states[:, num_inputs:], official[f"propagator.{layer}"], f"propagator {layer}")


@pytest.mark.parametrize("name", EVAL_CASES)
@torch.no_grad()
def test_with_sampling_evaluation_is_the_official_one(name: str) -> None:
    case = nac_case(name)
    model = nac(case, sample_in_eval=True)
    with recorded_noise(case):
        logits = model(case.inputs["pixel_values"]).logits
    assert_close(logits, case.outputs["noisy.logits"], "logits")


@pytest.mark.parametrize("name", EVAL_CASES[1:])
@torch.no_grad()
def test_the_graph_is_the_official_one(name: str) -> None:
    case = nac_case(name)
    affinities = nac(case).nac.log_affinities()
    names = [f"propagator_log_kernel.{layer}" for layer in range(len(affinities) - 1)] + ["read_out_log_kernel"]
    for ours, what in zip(affinities, names, strict=True):
        official = case.outputs[f"noise_free.{what}"]
        ours = ours.log_softmax(dim=-1).expand_as(official)
        assert torch.equal(ours.isinf(), official.isinf()), f"{what}: other edges"
        assert_close(ours[~ours.isinf()], official[~official.isinf()], what)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", TRAIN_CASES)
def test_training_step_and_all_gradients(name: str, attention: str) -> None:
    case = nac_case(name)
    regulariser = case.config["loss"]["graph_sparsity"]
    model = nac(
        case, signature_repulsion_coef=regulariser["weight"], signature_repulsion_hinge=regulariser["hinge"]
    ).train()
    model.set_attn_implementation(attention)
    with recorded_noise(case):
        logits = model(case.inputs["pixel_values"]).logits
    assert_close(logits, case.outputs["logits"], "logits")
    classification = per_sample_cross_entropy(logits, case.inputs["soft_targets"]).mean()
    assert_close(classification, case.outputs["loss.classification"], "cross entropy")
    graph = model.graph_losses()
    assert_close(graph["signature_repulsion_loss"], case.outputs["loss.graph_sparsity"], "repulsion")
    loss = classification + graph["aux_loss"]
    assert_close(loss, case.outputs["loss.loss"], "loss")
    loss.backward()

    official, parameters = convert_nac(case.gradients()), dict(model.named_parameters())
    assert parameters.keys() == official.keys()
    for parameter_name, parameter in parameters.items():
        # a constant added to all confidences changes nothing: what is left of this gradient is round-off
        reference = parameter_name.replace("confidence.bias", "confidence.weight")
        norm = official[reference].norm().item()
        error = (parameter.grad - official[parameter_name]).norm().item()
        assert error <= TRAIN_CASES[name] * norm, f"{parameter_name}: off by {error:.2e} of norm {norm:.2e}"
