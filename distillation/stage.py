"""A stage: consecutive layers of a model, as a view on its own layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.errors import StageError


class Stage(nn.Module):
    """
    Consecutive layers of a model. Its parameters are the model's own tensors, with the same names in the state dict:
    the state dicts of all stages together are the state dict of the model.

    The first stage takes `pixel_values` of shape `(batch_size, num_channels, height, width)`, the others hidden states
    of shape `(batch_size, num_tokens, hidden_size)`; the last one returns logits of shape `(batch_size, num_labels)`.
    The subclasses are [`TransformerStage`], [`VMoEStage`] and [`NACStage`]. Every difference between architectures is
    a method or an attribute of them.

    Attributes:
        config (`PreTrainedConfig`): The configuration of the whole model.
        index (`int`): Position in the chain, from 0.
        num_stages (`int`): Length of the chain.
        layer_indices (`range`): The layers of the model that are in this stage.
        takes_any_tokens (`bool`): Whether a student stage works with any number of tokens that the meta model has.
        keeps_stitches (`bool`): Whether the model has places for the stitches between its stages.
        has_experts (`bool`): Whether such a network can be upcycled from a dense one.
        has_graph (`bool`): Whether the model's latents exchange messages along a graph.
        is_meta_source (`bool`): Whether a meta model can be made from the layers of such a network.
        interpolates_positions (`bool`): Whether such a network, once trained, takes images of another size.
        few_shot_head (`str`): How a new head is trained on its features: `"adamw"` or `"sgd"`.
    """

    takes_any_tokens: ClassVar[bool] = False
    keeps_stitches: ClassVar[bool] = False
    has_experts: ClassVar[bool] = False
    has_graph: ClassVar[bool] = False
    is_meta_source: ClassVar[bool] = True
    interpolates_positions: ClassVar[bool] = False
    few_shot_head: ClassVar[str] = "adamw"

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

    @classmethod
    def classifiers_of(cls, model: PreTrainedModel) -> list[nn.Module]:
        """The heads of a model."""
        return [model.classifier]

    @classmethod
    def count_layers(cls, model: PreTrainedModel) -> int:
        """Count the layers of a model, which the depths of its stages must add up to."""
        raise NotImplementedError

    @classmethod
    def can_be_cut(cls, model: PreTrainedModel) -> bool:
        """Whether a model can be more than one stage."""
        return True

    @classmethod
    def split(cls, model: PreTrainedModel, depths: Sequence[int]) -> "list[Stage]":
        """Split a model into all its stages; the depths are already checked."""
        starts = [sum(depths[:i]) for i in range(len(depths))]
        return [
            cls(model, index, len(depths), range(start, start + depth))
            for index, (start, depth) in enumerate(zip(starts, depths, strict=True))
        ]

    @classmethod
    def leave_out_uncountable(cls, config: PreTrainedConfig) -> None:
        """Switch off in place what cannot be computed on the meta device and has no matrix products."""

    @classmethod
    def resize(cls, model: PreTrainedModel, image_size: int) -> None:
        """Adapt a model in place to square images of another size, where `interpolates_positions`."""
        raise NotImplementedError

    @classmethod
    def shallow(cls, config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
        """The configuration of a model with some of the layers, by their indices."""
        fields = config.to_dict()
        tower = fields.get("vision_config", fields)
        tower["num_hidden_layers"] = len(kept)
        for derived in ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices"):
            # fields of a backbone that name the layers
            tower.pop(derived, None)
        if fields.get("moe_layers") is not None:
            fields["moe_layers"] = [place for place, index in enumerate(kept) if index in config.moe_layers]
        return type(config).from_dict(fields)

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

    def vmoe_weights(self) -> dict[str, torch.Tensor]:
        """The stage's tensors under the names of a V-MoE. Raises `StageError` if it is no stage of a transformer."""
        raise StageError(
            f"A {self.config.model_type} has no layers that a V-MoE could start from. Use a ViT, DeiT or DINOv2."
        )

    def distilled(self) -> "Stage":
        """The part of the stage that distillation trains."""
        return self

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers."""
        return any(
            (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0) > 0
            for module in self.modules()
        )

    @property
    def is_shared(self) -> bool:
        """Whether other stages read parts of this one, so that it needs weights wherever they are trained."""
        return False

    @contextmanager
    def auxiliary_losses(self) -> "Iterator[Callable[[], dict[str, torch.Tensor]]]":
        """
        Context manager around a forward in training. It yields a function that returns the auxiliary losses by name
        afterwards; their weighted sum is `aux_loss`.
        """
        yield dict

    def extra_repr(self) -> str:
        return f"stage {self.index} of {self.num_stages}, layers {list(self.layer_indices)}"
