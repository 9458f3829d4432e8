"""Reads the cases in `official/` and builds our networks from their official weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from m2mkd import VMoEForImageClassification, split_into_stages
from m2mkd.conversion import official_models
from m2mkd.conversion.official_models import (
    convert_vmoe_student,
    transformer_to_ours,
    vmoe_config,
    vmoe_student_config,
)
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.stitched_student import StitchedStage


FOLDER = Path(__file__).parent / "official"
FORWARD_TOLERANCE = 1e-5  # of the largest value
GRADIENT_TOLERANCE = 1e-4  # relative norm


class Case:
    """One folder of `official/`: `case.config`, and `case.inputs`, `case.outputs`, … read from its safetensors."""

    def __init__(self, name: str):
        self.folder = FOLDER / name
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())

    def __getattr__(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def gradients(self, prefix: str = "grad.") -> dict[str, torch.Tensor]:
        """Official gradients by official parameter name."""
        return {k.removeprefix(prefix): v for k, v in self.outputs.items() if k.startswith(prefix)}


def assert_close(ours: torch.Tensor, official: torch.Tensor, what: str) -> None:
    scale = official.abs().max().item()
    error = (ours.detach().float() - official).abs().max().item()
    assert error <= FORWARD_TOLERANCE * max(scale, 1e-3), f"{what}: off by {error:.2e}, largest value {scale:.2e}"


def assert_gradients_close(parameters: dict[str, torch.Tensor], official: dict[str, torch.Tensor]) -> None:
    """`parameters` by our names, `official` gradients already converted to our names."""
    assert parameters.keys() == official.keys()
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # a key bias has no gradient in exact arithmetic (softmax does not see a constant): what is left is round-off
        # of the official `qkv.bias`, whose norm is that of its value part
        norm = official[name.replace("k_proj.bias", "v_proj.bias")].norm().item()
        error = (gradient - official[name]).norm().item()
        assert error <= GRADIENT_TOLERANCE * norm, f"{name}: off by {error:.2e} of norm {norm:.2e}"


# Beside a network's arguments some cases say where it is cut.
NO_ARGUMENTS = ("norm_eps", "block_index", "start", "end")


def vit_config(kwargs: dict[str, Any], norm_eps: float) -> ViTConfig:
    return official_models.vit_config({k: v for k, v in kwargs.items() if k not in NO_ARGUMENTS}, norm_eps)


def vit(kwargs: dict[str, Any], norm_eps: float, official: dict[str, torch.Tensor]) -> ViTForImageClassification:
    model = ViTForImageClassification(vit_config(kwargs, norm_eps)).eval()
    model.load_state_dict(transformer_to_ours("vit", official), strict=True)
    return model


def vit_stage(kwargs: dict[str, Any], norm_eps: float, index: int, official: dict[str, torch.Tensor]) -> Stage:
    """One stage from a split teacher file; the rest of the teacher is never built."""
    with torch.device("meta"):
        model = ViTForImageClassification(vit_config(kwargs, norm_eps))
    depths = kwargs["divided_depths"]
    stage = split_into_stages(model, depths)[index].to_empty(device="cpu")
    stage.load_state_dict(transformer_to_ours("vit", official, layer_offset=sum(depths[:index])), strict=True)
    return stage.eval()


def vmoe(case: Case, **overrides: Any) -> VMoEForImageClassification:
    model = VMoEForImageClassification(vmoe_config(case.config["kwargs"], case.config["norm_eps"], **overrides)).eval()
    model.load_state_dict(transformer_to_ours("vmoe", case.state_dict), strict=True)
    return model


def student_model(
    kwargs: dict[str, Any], norm_eps: float, num_pairs: int = 3
) -> tuple[VMoEForImageClassification, int]:
    """A V-MoE around one official student, with its pair index; the layers of other pairs are like the student's."""
    config = vmoe_student_config(kwargs, norm_eps, num_pairs)
    return VMoEForImageClassification(config), kwargs["idx"] % num_pairs


def student_names(
    kwargs: dict[str, Any], official: dict[str, torch.Tensor], num_pairs: int = 3
) -> dict[str, torch.Tensor]:
    """Official student tensors (or gradients) by the names of [`StitchedStage`]."""
    layer_offset = sum(kwargs["divided_depths"]) * (kwargs["idx"] % num_pairs)
    stage, stitches = convert_vmoe_student(official, layer_offset)
    return {**{f"stage.{name}": tensor for name, tensor in stage.items()}, **stitches}


def load_student(pair: StitchedStage, kwargs: dict[str, Any], official: dict[str, torch.Tensor]) -> None:
    pair.load_state_dict(student_names(kwargs, official), strict=True)


def stage_of(model: PreTrainedModel, kwargs: dict[str, Any], index: int, num_pairs: int = 3) -> Stage:
    return split_into_stages(model, [sum(kwargs["divided_depths"])] * num_pairs)[index]
