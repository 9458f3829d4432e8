"""Our networks and losses against the official code's own numbers."""

import pytest
import torch
import torch.nn.functional as F
from official_cases import (
    Case,
    assert_close,
    assert_gradients_close,
    load_student,
    stage_of,
    student_model,
    student_names,
    vit,
    vit_stage,
    vmoe,
)

from m2mkd import split_into_stages
from m2mkd.conversion.official_models import transformer_to_ours, vmoe_config
from m2mkd.distillation.frozen_networks import FrozenNetworks
from m2mkd.distillation.losses import hard_distillation_loss, per_sample_cross_entropy, soft_distillation_loss
from m2mkd.distillation.stitched_student import StitchedStage
from m2mkd.modeling.modeling_vmoe import VMoELayer


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_vmoe(experts: str) -> None:
    case = Case("vmoe_full")
    model = vmoe(case)
    model.set_experts_implementation(experts)
    pixel_values = case.inputs["input"]
    outputs = model(pixel_values, output_hidden_states=True, output_router_logits=True)
    assert_close(outputs.logits, case.outputs["output"], "logits")
    for layer, hidden_states in enumerate(outputs.hidden_states[1:]):
        assert_close(hidden_states, case.outputs[f"block.{layer}"], f"layer {layer}")
    for layer, router_logits in zip(model.config.moe_layers, outputs.router_logits, strict=True):
        assert_close(router_logits, case.outputs[f"gate_logits.{layer}"], f"router of layer {layer}")
        chosen = router_logits.topk(2).indices.sort().values
        assert torch.equal(chosen, case.outputs[f"gate_top_k_idx.{layer}"].sort().values)
    (outputs.logits * case.inputs["probe"]).sum().backward()
    assert_gradients_close(dict(model.named_parameters()), transformer_to_ours("vmoe", case.gradients()))


@pytest.mark.parametrize("name", ["vmoe_student_first", "vmoe_student_middle", "vmoe_student_last"])
def test_vmoe_student(name: str) -> None:
    case = Case(name)
    kwargs = case.config["kwargs"]
    model, index = student_model(kwargs, case.config["norm_eps"])
    pair = StitchedStage(stage_of(model, kwargs, index), kwargs["stitch_dim"]).eval()
    load_student(pair, kwargs, case.state_dict)
    output, balance = pair(case.inputs["input"])
    assert balance == {}
    assert_close(output, case.outputs["output"], "output")
    (output * case.inputs["probe"]).sum().backward()
    assert_gradients_close(dict(pair.named_parameters()), student_names(kwargs, case.gradients()))


def test_stitches_kept_in_the_model_compute_what_they_do_beside_it() -> None:
    case = Case("vmoe_student_middle")
    kwargs = case.config["kwargs"]
    config = vmoe_config(kwargs, 1e-6)
    assert (config.stitch_size, config.pre_stitch_layers, config.post_stitch_layers) == (40, [0], [1])
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    layers = torch.nn.ModuleList([VMoELayer(config, index) for index in range(2)]).eval()
    converted = transformer_to_ours("vmoe", case.state_dict)
    layers.load_state_dict({k.removeprefix("vmoe.layers."): v for k, v in converted.items()}, strict=True)
    assert_close(layers[1](layers[0](case.inputs["input"])), case.outputs["output"], "output")


def test_incubated_vit() -> None:
    case = Case("incubated_vit")
    model = vit(case.config["kwargs"], case.config["norm_eps"], case.state_dict)
    logits = model(case.inputs["pixel_values"]).logits
    assert_close(logits, case.outputs["logits"], "logits")
    loss = per_sample_cross_entropy(logits, case.inputs["soft_targets"]).mean()
    assert_close(loss, case.outputs["loss"], "loss")
    loss.backward()
    assert_gradients_close(dict(model.named_parameters()), transformer_to_ours("vit", case.gradients()))


@pytest.mark.parametrize("start, end", Case("incubated_vit").config["partials"])
def test_incubated_vit_in_part(start: int, end: int) -> None:
    case = Case("incubated_vit")
    model = vit(case.config["kwargs"], case.config["norm_eps"], case.state_dict)
    stages = split_into_stages(model, [1] * model.config.num_hidden_layers)
    hidden_states = case.inputs["pixel_values" if start == 0 else "hidden_states"]
    for stage in stages[start:end]:
        hidden_states = stage(hidden_states)
    official = case.outputs[f"partial.{start}_{end}"]
    assert_close(hidden_states, official, f"layers {start} to {end}")


PAIRS = ["m2mkd_vmoe_0", "m2mkd_vmoe_1", "m2mkd_vmoe_last"]
DISTILLATIONS = ["soft_tau1", "soft_tau2_alpha0.3", "hard"]


@pytest.mark.parametrize("distillation", DISTILLATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_m2mkd_pair(name: str, distillation: str) -> None:
    case = Case(name)
    meta_kwargs, teacher_kwargs = case.config["meta"], case.config["teacher"]
    student = case.config["student"]
    model, index = student_model(student["kwargs"], student["norm_eps"])
    pair = StitchedStage(stage_of(model, student["kwargs"], index), student["kwargs"]["stitch_dim"])
    load_student(pair, student["kwargs"], case.state_dict)
    meta = vit(meta_kwargs, meta_kwargs["norm_eps"], case.meta_state_dict)
    teacher = vit_stage(teacher_kwargs, teacher_kwargs["norm_eps"], index, case.teacher_block_state_dict)
    frozen = FrozenNetworks(split_into_stages(meta, meta_kwargs["divided_depths"]), {index: teacher})

    inputs = frozen.prefix(case.inputs["pixel_values"], [index])
    if index > 0:
        assert_close(inputs[index], case.outputs["meta_output"], "prefix")
    teacher_logits = frozen.inputs_and_targets(case.inputs, [index])[1][index]
    assert_close(teacher_logits, case.outputs["teacher_outputs"], "teacher logits")
    output, _ = pair(inputs[index])
    assert_close(output, case.outputs["student_module_output"], "student module")
    logits = frozen.suffix(output, index)
    assert_close(logits, case.outputs["student_outputs"], "student logits")

    settings = case.config["distillation"][distillation]
    alpha, tau = settings["alpha_teacher"], settings["tau"]
    base = per_sample_cross_entropy(logits, case.inputs["soft_targets"]).mean()
    assert_close(base, case.outputs["base_loss"], "cross entropy")
    if settings["type"] == "hard":
        distilled = hard_distillation_loss(logits, teacher_logits)
    else:
        distilled = soft_distillation_loss(logits, teacher_logits, tau, reduction="mean")
        by_image = soft_distillation_loss(logits, teacher_logits, tau, reduction="batchmean")
        assert torch.allclose(by_image, distilled * logits.shape[-1])
    loss = (1 - alpha) * base + alpha * distilled
    assert_close(loss, case.outputs[f"{distillation}.loss"], "loss")

    official = case.gradients(f"{distillation}.grad.")
    if official:
        loss.backward()
        assert_gradients_close(dict(pair.named_parameters()), student_names(student["kwargs"], official))
        assert all(parameter.grad is None for parameter in frozen.parameters())


def test_soft_targets_are_the_official_soft_target_cross_entropy() -> None:
    logits, targets = torch.randn(5, 7), torch.rand(5, 7).softmax(dim=-1)
    official = (-targets * F.log_softmax(logits, dim=-1)).sum(dim=-1)
    assert torch.allclose(per_sample_cross_entropy(logits, targets), official, atol=1e-6)
