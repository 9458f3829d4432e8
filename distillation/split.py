"""A model seen as a chain of stages: views on its own layers, never copies, T = T_N ∘ … ∘ T_1."""

from collections.abc import Sequence

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from m2mkd.distillation.architectures import ARCHITECTURES
from m2mkd.distillation.nac_stages import NACStage
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.timm_stage import TimmStage
from m2mkd.distillation.transformer_stage import TransformerStage
from m2mkd.distillation.vmoe_stage import VMoEStage
from m2mkd.distillation.whole_stage import WholeStage
from m2mkd.errors import StageError


# Stage classes by the name of the classifier.
_STAGES: dict[str, type[Stage]] = {
    **dict.fromkeys(ARCHITECTURES, TransformerStage),
    "TimmWrapperForImageClassification": TimmStage,
    "VMoEForImageClassification": VMoEStage,
    "NACForImageClassification": NACStage,
}

CAN_BE_CUT = "ViT, DeiT, DINOv2, DINOv3-ViT, BEiT, CLIP, SigLIP, timm's VisionTransformer, V-MoE and NAC"


def split_into_stages(model: PreTrainedModel, depths: Sequence[int]) -> list[Stage]:
    """
    Cut a classifier into consecutive stages. They are views: running them in order gives the model's own logits, and
    training a stage trains the model in place.

    Args:
        model (`PreTrainedModel`):
            A ViT, DeiT, DINOv2, DINOv3-ViT, BEiT, CLIP, SigLIP, timm ViT, V-MoE or NAC for image classification. Any
            other classifier is one stage.
        depths (`Sequence[int]`): Transformer layers of each stage; the paper cuts ViT-Large as `[6, 6, 6, 6]`. A NAC
            counts its read-in, each round of messages and its read-out: the paper cuts it as `[1] * 10`.

    Returns:
        `list[Stage]`: One stage per depth.

    Raises:
        `StageError`: the depths do not add up to the model's layers, or the architecture cannot be cut.

    Example:

    ```python
    >>> import torch
    >>> from m2mkd import VMoEConfig, VMoEForImageClassification, split_into_stages

    >>> model = VMoEForImageClassification(VMoEConfig.from_preset("tiny")).eval()
    >>> pixel_values = hidden_states = torch.rand(2, 3, 32, 32)
    >>> for stage in split_into_stages(model, [2, 2]):
    ...     hidden_states = stage(hidden_states)
    >>> torch.equal(hidden_states, model(pixel_values).logits)
    True

    ```"""
    depths = list(depths)
    architecture, num_layers = stage_class(type(model)), count_layers(model)
    if not depths or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in depths):
        raise StageError(f"`depths` must be whole numbers of at least 1, one per stage, but is {depths}.")
    if depths != [1]:
        check_can_be_cut(model)
    if sum(depths) != num_layers:
        raise StageError(
            f"The depths {depths} add up to {sum(depths)} layers, but {type(model).__name__} has {num_layers}. "
            "Assign every layer to one stage."
        )
    return architecture.split(model, depths)


def check_can_be_cut(model: PreTrainedModel) -> None:
    """Raise `StageError` if a classifier is one stage."""
    if not stage_class(type(model)).can_be_cut(model):
        name = type(getattr(model, "timm_model", model)).__name__
        raise StageError(
            f"{name} cannot be cut into stages. These can: {CAN_BE_CUT}. It can still teach as a whole: in a recipe, "
            "leave out `teacher.depths` and the arms that start from modules, and use the arm `kd`."
        )


def stage_class(model_class: type[PreTrainedModel]) -> type[Stage]:
    """The stage class for a classifier; an architecture that is not known is one stage."""
    return _STAGES.get(model_class.__name__, WholeStage)


def stage_class_of(config: PreTrainedConfig) -> type[Stage]:
    """The stage class for the classifiers with a configuration."""
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return stage_class(classes[0] if isinstance(classes, tuple) else classes)


def stage_class_of_type(model_type: str) -> type[Stage]:
    """The stage class for the classifiers of a `model_type`."""
    return stage_class_of(AutoConfig.for_model(model_type))


def count_layers(model: PreTrainedModel) -> int:
    """
    Count the layers that the depths of `split_into_stages` must add up to; an architecture that is not known is one.
    """
    return stage_class(type(model)).count_layers(model)


@torch.no_grad()
def initialize_stage(model: PreTrainedModel, stage: Stage, seed: int) -> None:
    """
    Draw the weights of a stage from its own seed, so that they are the same whether it is built alone or with others.

    A stage on the meta device is materialized on the CPU first, so that a process can hold a single stage of a large
    model: build the model under `torch.device("meta")`, split it, and initialize the stage that you train.

    Args:
        model (`PreTrainedModel`): The model that `stage` is a view on.
        stage (`Stage`)
        seed (`int`): Seed of the run; the stage's index is mixed in.
    """
    if any(parameter.is_meta for parameter in stage.parameters()):
        stage.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1000 + stage.index)
        for module in stage.modules():
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            model._init_weights(module)


def new_network(
    config: PreTrainedConfig, depths: Sequence[int], seed: int, indices: Sequence[int] | None = None
) -> PreTrainedModel:
    """
    Build a network with new weights, each stage drawn from its own seed.

    Args:
        config (`PreTrainedConfig`)
        depths (`Sequence[int]`): Layers of each stage.
        seed (`int`)
        indices (`Sequence[int]`, *optional*): Stages to materialize; the others stay on the meta device. `None`: all.
    """
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    for stage in split_into_stages(model, depths):
        if indices is None or stage.index in indices or stage.is_shared:
            initialize_stage(model, stage, seed)
    return model
