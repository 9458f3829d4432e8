"""Cost of one training step through a network, counted on the meta device: FLOPs, memory, parameters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from m2mkd.distillation.split import stage_class
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.stitched_student import StitchedStudent
from m2mkd.experiment.flops import count_parameters


# Number of images in the counted pass: a batch of one would hide costs that grow with it.
COUNTED_IMAGES = 2


@dataclass(frozen=True)
class StepCost:
    """FLOPs per image, bytes of float32 that it keeps for the backward pass, and parameters that it passes through."""

    flops: float = 0.0
    saved: float = 0.0
    parameters: int = 0
    frozen: int = 0

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(
            self.flops + other.flops,
            self.saved + other.saved,
            self.parameters + other.parameters,
            self.frozen + other.frozen,
        )


class StageCounter:
    """Counts steps through frozen stages, each once per shape of its input."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[StepCost, torch.Size]] = {}

    def forward(self, stage: Stage, shape: Sequence[int]) -> tuple[StepCost, torch.Size]:
        """Count a step without gradient. Returns the cost and the shape of the output."""
        return self._count(stage, tuple(shape), passes_gradient=False)

    def passed(self, stage: Stage, shape: Sequence[int]) -> tuple[StepCost, torch.Size]:
        """Count a step with gradient for the input. Returns the cost and the shape of the output."""
        return self._count(stage, tuple(shape), passes_gradient=True)

    def _count(self, stage: Stage, shape: tuple[int, ...], passes_gradient: bool) -> tuple[StepCost, torch.Size]:
        # the networks live as long as the plan is made, so an id identifies one of them
        key = (id(stage.config), stage.layer_indices, shape, passes_gradient)
        if key not in self._known:
            stage.requires_grad_(False).eval()
            flops, saved, out = _run(stage, shape, passes_gradient, backward=passes_gradient)
            self._known[key] = StepCost(flops, saved, frozen=count_parameters(stage)), out
        return self._known[key]


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without weights, with the plain paths of attention and experts, which torch's counter knows."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    # fused attention and grouped products compute the same
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "batched_mm"
    stage_class(type(model)).leave_out_uncountable(model.config)
    return model


def stitched_pairs(
    student: PreTrainedModel, stages: Sequence[Stage], width: int, stitch: str | None, **options: Any
) -> list[nn.Module]:
    """Build the student's stages as the trainer distils them: with stitches to and from hidden states of `width`."""
    with torch.device("meta"):
        return list(StitchedStudent(student, stages, width, stitch, **options).pairs.values())


def trained_cost(pair: nn.Module, shape: Sequence[int], layers_only: bool = False) -> tuple[StepCost, torch.Size]:
    """Count a step through a pair that is trained, whole or only its layers. Returns also the shape of the output."""
    pair.requires_grad_(not layers_only)
    for layer in pair.stage.layers if layers_only else ():
        layer.requires_grad_(True)
    # FLOPs in evaluation mode, as a run counts them; kept memory in training mode
    flops, _, out = _run(pair.eval(), shape, passes_gradient=False, backward=True)
    _, saved, _ = _run(pair.train(), shape, passes_gradient=False, backward=True)
    pair.zero_grad(set_to_none=True)
    trained = sum(parameter.numel() for parameter in pair.parameters() if parameter.requires_grad)
    return StepCost(flops, saved, parameters=trained), out


def _run(
    module: nn.Module, shape: Sequence[int], passes_gradient: bool, backward: bool
) -> tuple[float, float, torch.Size]:
    """FLOPs and saved bytes per image of a pass through a module, and the shape of its output."""
    states = torch.empty(*shape, device="meta", requires_grad=passes_gradient)
    saved = _SavedActivations(module.parameters())
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter, saved:
        out = module(states)
        out = out[0] if isinstance(out, tuple) else out
        if backward:
            # a loss has no matrix products
            out.sum().backward()
    return counter.get_total_flops() / COUNTED_IMAGES, saved.nbytes / COUNTED_IMAGES, out.shape


class _SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward, without parameters and what fused kernels do not keep."""

    def __init__(self, parameters: Iterable[torch.Tensor]):
        parameters = list(parameters)
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        # a product with expert weights gathered for each token keeps them; grouped products do not
        self._gathered = {tuple(parameter.shape[1:]) for parameter in parameters if parameter.ndim == 3}
        self._gathered |= {shape[::-1] for shape in self._gathered}
        # kept alive, so that no storage is reused for another tensor
        self._kept: dict[int, torch.Tensor] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        is_map = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2]
        is_gathered = tensor.ndim == 3 and tuple(tensor.shape[1:]) in self._gathered
        if storage not in self._parameters and not is_map and not is_gathered:
            self._kept[storage] = tensor
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())
