# Copyright 2026 The m2mkd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A model seen as a chain of stages: views on its own layers, never copies, T = T_N ∘ … ∘ T_1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class StageError(ValueError):
    """A model cannot be cut, or networks cannot be stitched, as asked."""


@dataclass(frozen=True)
class _Architecture:
    """Where the parts of a classifier lie, as module paths, and how its head reads the last hidden states."""

    embeddings: str
    layers: str
    layernorm: str
    pool: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    classifiers: tuple[str, ...] = ("classifier",)


def _class_token(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    return (hidden_states[:, 0],)


def _class_and_distillation_token(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden_states[:, 0], hidden_states[:, 1]


def _class_token_and_patch_mean(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
    if hidden_states.shape[1] == 1:
        raise StageError(
            "The head of a DINOv2 reads the class token and the mean of the patches, but it is given one token. If "
            "this is the read-in of a NAC, set `read_in_latents` to 'all' (in a recipe, in `distill.training`)."
        )
    return (torch.cat([hidden_states[:, 0], hidden_states[:, 1:].mean(dim=1)], dim=1),)


_ARCHITECTURES = {
    "ViTForImageClassification": _Architecture("vit.embeddings", "vit.layers", "vit.layernorm", _class_token),
    "DeiTForImageClassification": _Architecture("deit.embeddings", "deit.layers", "deit.layernorm", _class_token),
    # Each head reads a token of its own; the logits are their mean.
    "DeiTForImageClassificationWithTeacher": _Architecture(
        "deit.embeddings",
        "deit.layers",
        "deit.layernorm",
        _class_and_distillation_token,
        ("cls_classifier", "distillation_classifier"),
    ),
    "Dinov2ForImageClassification": _Architecture(
        "dinov2.embeddings", "dinov2.encoder.layer", "dinov2.layernorm", _class_token_and_patch_mean
    ),
    "VMoEForImageClassification": _Architecture("vmoe.embeddings", "vmoe.layers", "vmoe.layernorm", _class_token),
}
_CIRCUIT = "NACForImageClassification"


class Stage(nn.Module):
    """
    Consecutive layers of a model. Its parameters are the model's own tensors, and its state dict names them as the
    model's does: the state dicts of all stages together are the state dict of the model.

    The first stage takes `pixel_values` of shape `(batch_size, num_channels, height, width)`, the others hidden states
    of shape `(batch_size, num_tokens, hidden_size)`; the last one returns logits of shape `(batch_size, num_labels)`.
    [`TransformerStage`] and `NACStage` are the two kinds.

    Attributes:
        config (`PreTrainedConfig`): The configuration of the whole model.
        index (`int`): Position in the chain, from 0.
        num_stages (`int`): Length of the chain.
        layer_indices (`range`): The layers of the model that this stage holds.
    """

    def __init__(self, model: PreTrainedModel, index: int, num_stages: int, layer_indices: range):
        super().__init__()
        self.config: PreTrainedConfig = model.config
        self.index = index
        self.num_stages = num_stages
        self.layer_indices = layer_indices

    def _attach(self, model: PreTrainedModel, *paths: str) -> list[nn.Module]:
        modules = []
        for path in paths:
            module = model.get_submodule(path)
            node: nn.Module = self
            *parents, leaf = path.split(".")
            for parent in parents:
                if parent not in node._modules:
                    node.add_module(parent, nn.Module())
                node = node.get_submodule(parent)
            node.add_module(leaf, module)
            modules.append(module)
        return modules

    @property
    def is_first(self) -> bool:
        """Whether the stage takes images."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage returns logits."""
        return self.index == self.num_stages - 1

    @property
    def num_layers(self) -> int:
        """Number of layers in the stage."""
        return len(self.layer_indices)

    def distilled(self) -> "Stage":
        """The part of the stage that distillation trains."""
        return self

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers besides those of dropout, drop path and routers."""
        return False

    def auxiliary_losses(self) -> dict[str, torch.Tensor]:
        """Losses that do not depend on the images, by name; their weighted sum is `aux_loss`."""
        return {}

    def extra_repr(self) -> str:
        return f"stage {self.index} of {self.num_stages}, layers {list(self.layer_indices)}"


class TransformerStage(Stage):
    """Consecutive transformer layers, with the embeddings in the first stage and the head in the last."""

    def __init__(self, model: PreTrainedModel, index: int, num_stages: int, layer_indices: range):
        super().__init__(model, index, num_stages, layer_indices)
        architecture = _architecture_of(model)
        self._pool = architecture.pool
        # tuples, unlike attributes of their own, do not register the modules a second time
        self._embeddings = tuple(self._attach(model, architecture.embeddings)) if self.is_first else ()
        self._layers = tuple(self._attach(model, *(f"{architecture.layers}.{i}" for i in layer_indices)))
        head = (architecture.layernorm, *architecture.classifiers) if self.is_last else ()
        self._head = tuple(self._attach(model, *head))

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The transformer layers, in order."""
        return self._layers

    @property
    def embeddings(self) -> nn.Module | None:
        """The model's embeddings, in the first stage."""
        return self._embeddings[0] if self._embeddings else None

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): Images for the first stage, hidden states for the others.
            kwargs: Passed to the embeddings, e.g. `interpolate_pos_encoding=True`; only the first stage takes any.
        """
        for embeddings in self._embeddings:
            images = hidden_states.to(next(embeddings.parameters()).dtype)
            hidden_states = embeddings(images, **kwargs)
        for layer in self._layers:
            hidden_states = layer(hidden_states)
        if self._head:
            layernorm, *classifiers = self._head
            pooled = self._pool(layernorm(hidden_states))
            logits = [classifier(tokens) for classifier, tokens in zip(classifiers, pooled, strict=True)]
            hidden_states = logits[0] if len(logits) == 1 else sum(logits) / len(logits)
        return hidden_states


def split_into_stages(model: PreTrainedModel, depths: Sequence[int]) -> list[Stage]:
    """
    Cut a classifier into consecutive stages. They are views: running them in order gives the model's own logits, and
    training a stage trains the model in place.

    Args:
        model (`PreTrainedModel`):
            `ViTForImageClassification`, `DeiTForImageClassification`, `Dinov2ForImageClassification`,
            `VMoEForImageClassification` or `NACForImageClassification`.
        depths (`Sequence[int]`): Transformer layers of each stage; the paper cuts ViT-Large as `[6, 6, 6, 6]`. A NAC
            counts its read-in, each round of messages and its read-out: the paper cuts it as `[1] * 10`.

    Returns:
        `list[Stage]`: One stage a depth.

    Raises:
        `StageError`: the depths do not add up to the model's layers, or the architecture is not known.

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
    num_layers = count_layers(model)
    if not depths or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in depths):
        raise StageError(f"`depths` must be whole numbers of at least 1, one a stage, but is {depths}.")
    if sum(depths) != num_layers:
        raise StageError(
            f"The depths {depths} add up to {sum(depths)} layers, but {type(model).__name__} has {num_layers}. "
            "Give every layer to one stage."
        )
    if type(model).__name__ == _CIRCUIT:
        # here, because it builds on this module
        from m2mkd.modeling.nac_stages import split_circuit

        return split_circuit(model, depths)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [
        TransformerStage(model, index, len(depths), range(start, start + depth))
        for index, (start, depth) in enumerate(zip(starts, depths, strict=True))
    ]


def count_layers(model: PreTrainedModel) -> int:
    """
    Layers that the depths of `split_into_stages` must add up to. Raises `StageError` for an unknown architecture.
    """
    if type(model).__name__ == _CIRCUIT:
        return model.config.num_hidden_layers + 2
    return len(model.get_submodule(_architecture_of(model).layers))


def _architecture_of(model: PreTrainedModel) -> _Architecture:
    name = type(model).__name__
    if name not in _ARCHITECTURES:
        known = sorted([*_ARCHITECTURES, _CIRCUIT])
        raise StageError(f"{name} cannot be cut into stages; the architectures that can are {known}.")
    return _ARCHITECTURES[name]


@torch.no_grad()
def initialize_stage(model: PreTrainedModel, stage: Stage, seed: int) -> None:
    """
    Draw the weights of a stage from a seed of its own: it starts the same whether it is built alone or with others.

    A stage on the meta device is materialised on the CPU first, so that a process can hold one stage of a large model:
    build the model under `torch.device("meta")`, split it, initialise the stage that you train.

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


def num_special_tokens(config: PreTrainedConfig) -> int:
    """Tokens before those of the patches: the class token, and the distillation token of a DeiT."""
    return 2 if config.model_type == "deit" else 1


def num_tokens(config: PreTrainedConfig) -> int:
    """Tokens of a hidden state of a model with this configuration: its special tokens and its patches."""
    return num_special_tokens(config) + _num_patches(config)


def _num_patches(config: PreTrainedConfig) -> int:
    sizes = [
        size if isinstance(size, list | tuple) else (size, size) for size in (config.image_size, config.patch_size)
    ]
    (height, width), (patch_height, patch_width) = sizes
    return (height // patch_height) * (width // patch_width)


def check_stitchable(
    student: PreTrainedConfig, teacher: PreTrainedConfig | None, meta: PreTrainedConfig | None
) -> None:
    """
    Check that the three networks can exchange hidden states and be compared on one label space.

    Args:
        student, teacher, meta (`PreTrainedConfig`): `None` where a network takes no part.

    Raises:
        `StageError`: teacher and meta model differ in width or special tokens, two networks differ in patches or label
            space.
    """
    if teacher is not None and meta is not None and teacher.hidden_size != meta.hidden_size:
        raise StageError(
            f"The teacher is {teacher.hidden_size} wide and the meta model {meta.hidden_size}; their modules exchange "
            "hidden states without a stitch, so `hidden_size` must be equal (stitches are for the student)."
        )
    if teacher is not None and meta is not None and num_special_tokens(teacher) != num_special_tokens(meta):
        raise StageError(
            f"Before the tokens of the patches the teacher (a {teacher.model_type}) has {num_special_tokens(teacher)} "
            f"and the meta model (a {meta.model_type}) {num_special_tokens(meta)}; their modules exchange hidden "
            "states without a stitch. Use a meta model of the teacher's architecture, e.g. one made with "
            "`meta_from_teacher` (in a recipe, `meta.init: from_teacher`)."
        )
    for name, other in (("teacher", teacher), ("meta model", meta)):
        if other is None:
            continue
        # a NAC takes whatever tokens the meta model has
        if meta is not None and student.model_type != "nac" and _num_patches(student) != _num_patches(other):
            raise StageError(
                f"The student has {_num_patches(student)} patches (image_size {student.image_size}, patch_size "
                f"{student.patch_size}) and the {name} {_num_patches(other)} (image_size {other.image_size}, "
                f"patch_size {other.patch_size}); stitches change the width, not the number of patches. Give them the "
                "same grid."
            )
        _check_label_space(student, other, name)


def _check_label_space(student: PreTrainedConfig, other: PreTrainedConfig, name: str) -> None:
    if student.num_labels != other.num_labels:
        raise StageError(
            f"The student has {student.num_labels} classes and the {name} {other.num_labels}; the distillation loss "
            "compares them class by class. Use networks with one label space."
        )
    ours, theirs = dict(student.id2label), dict(other.id2label)
    generic = {i: f"LABEL_{i}" for i in range(student.num_labels)}
    if generic in (ours, theirs) or ours == theirs:
        return
    first = next(i for i in ours if ours[i] != theirs.get(i))
    raise StageError(
        f"The student's class {first} is '{ours[first]}', the {name}'s is '{theirs.get(first)}'; the label spaces "
        "differ. Use networks trained on the same classes in the same order."
    )


def check_same_normalization(first: Any, second: Any, names: tuple[str, str]) -> None:
    """
    Check that two image processors feed their networks the same pixels: both see the very same batch.

    Args:
        first, second (image processors of transformers)
        names (`tuple[str, str]`): What the message calls their networks.

    Raises:
        `StageError`: mean, standard deviation, rescaling or size differ.
    """
    for field in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "size"):
        ours, theirs = (getattr(processor, _final(field, processor), None) for processor in (first, second))
        if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
            ours, theirs = list(ours), list(theirs)
        if ours != theirs:
            raise StageError(
                f"The image processors of the {names[0]} and the {names[1]} differ in `{field}`: {ours} and {theirs}. "
                "Both networks see the same batch, so set the data's `mean`, `std` and `image_size` to the teacher's."
            )


def _final(field: str, processor: Any) -> str:
    """Where the size of the pixels is said that reach the network: after a resize the centre may be cut out."""
    return "crop_size" if field == "size" and getattr(processor, "do_center_crop", None) else field


__all__ = [
    "Stage",
    "StageError",
    "TransformerStage",
    "check_same_normalization",
    "check_stitchable",
    "count_layers",
    "initialize_stage",
    "num_special_tokens",
    "num_tokens",
    "split_into_stages",
]
