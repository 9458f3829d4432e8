"""Official ViTs, V-MoEs and their students."""

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, ViTForImageClassification

from m2mkd.conversion.checkpoint_file import section
from m2mkd.conversion.kind import (
    Request,
    ReversibleKind,
    StudentKind,
    checked_index,
    known_index,
    stitch_size_of,
)
from m2mkd.conversion.official_models import (
    check_tensors,
    convert_vmoe_student,
    shapes_of,
    stitch_shapes,
    transformer_to_official,
    transformer_to_ours,
    vit_config,
    vmoe_config,
    vmoe_student_config,
    without_aliases,
)
from m2mkd.conversion.output import Output, Position, Tensors, model_output, on_meta, stage_output
from m2mkd.distillation.split import split_into_stages
from m2mkd.errors import ConversionError
from m2mkd.modeling.modeling_vmoe import VMoEForImageClassification


class TransformerKind(ReversibleKind):
    """A ViT or V-MoE, whole or one stage of it."""

    @abstractmethod
    def config(self, kwargs: dict[str, Any], norm_eps: float, official: Mapping[str, Any]) -> PreTrainedConfig:
        """The configuration of a model with these arguments and tensors."""

    def convert(self, request: Request) -> Output:
        """The whole model, or the stage that `--stage` or the checkpoint names."""
        checkpoint, stage = request.checkpoint, request.stage
        kwargs = section(request.content, "kwargs")
        depths = checkpoint.depths or kwargs.get("divided_depths") or []
        if checkpoint.block is not None:
            if stage is not None and stage != checkpoint.block_index:
                raise ConversionError(f"--stage is {stage}, but the checkpoint holds stage {checkpoint.block_index}.")
            stage = checkpoint.block_index
        if stage is None:
            official = checkpoint.model_of(depths)
        else:
            official = without_aliases(checkpoint.stage_of(stage, depths))
        model = self.described_model(request.content, official)
        if stage is None:
            check_tensors(official, shapes_of(self.official_tensors(model)), f"the {self.name}")
            return model_output(model, transformer_to_ours(self.name, official))
        if sum(depths) != model.config.num_hidden_layers:
            raise ConversionError(
                f"the checkpoint's depths are {depths}, the configuration's {kwargs['divided_depths']}."
            )
        offset = sum(depths[:stage])
        part = split_into_stages(model, depths)[stage]
        check_tensors(
            official,
            shapes_of(transformer_to_official(self.name, part.state_dict(), offset)),
            f"stage {stage} of the {self.name}",
        )
        position = Position(stage, len(depths), list(range(offset, offset + depths[stage])))
        return stage_output(
            model, position, transformer_to_ours(self.name, official, offset), {}, model.config.hidden_size
        )

    def described_model(self, content: dict[str, Any], official: Mapping[str, Any]) -> PreTrainedModel:
        """See [`ReversibleKind`]."""
        kwargs = section(content, "kwargs")
        return on_meta(self.model_class, lambda: self.config(kwargs, norm_eps_of(content), official))

    def official_tensors(self, model: PreTrainedModel) -> Tensors:
        """See [`ReversibleKind`]."""
        return transformer_to_official(self.name, model.state_dict())

    def official_depths(self, content: dict[str, Any]) -> list[int] | None:
        """See [`ReversibleKind`]."""
        return content["kwargs"]["divided_depths"]


class ViTKind(TransformerKind):
    """An incubated ViT: a teacher or a meta model."""

    name = "vit"
    model_class = ViTForImageClassification

    def config(self, kwargs: dict[str, Any], norm_eps: float, official: Mapping[str, Any]) -> PreTrainedConfig:
        """See [`TransformerKind`]."""
        return vit_config(kwargs, norm_eps)


class VMoEKind(TransformerKind):
    """A V-MoE of m2mKD."""

    name = "vmoe"
    model_class = VMoEForImageClassification

    def config(self, kwargs: dict[str, Any], norm_eps: float, official: Mapping[str, Any]) -> PreTrainedConfig:
        """See [`TransformerKind`]."""
        if kwargs.get("pre_stitch_pos") is None and kwargs.get("post_stitch_pos") is None:
            # not said in the configuration, and plain from the checkpoint
            kwargs = {**kwargs, **_kept_stitches(official)}
        return vmoe_config(kwargs, norm_eps)


class VMoEStudentKind(StudentKind):
    """Consecutive layers of a V-MoE that were distilled by themselves."""

    name = "vmoe-student"
    default_stages = 4

    def convert(self, request: Request) -> Output:
        """The stage of a V-MoE."""
        content = request.content
        spec = section(content, "student") if "student" in content else content
        kwargs = section(spec, "kwargs")
        num_stages = self.num_stages(request)
        index = checked_index(
            known_index(request.path, {"idx": kwargs.get("idx"), **content}, request.stage, num_stages), num_stages
        )
        norm_eps = norm_eps_of(spec)
        model = on_meta(VMoEForImageClassification, lambda: vmoe_student_config(kwargs, norm_eps, num_stages))
        depth = sum(kwargs["divided_depths"])
        part = split_into_stages(model, [depth] * num_stages)[index]
        offset = index * depth
        expected = shapes_of(transformer_to_official("vmoe", part.state_dict(), offset))
        official = without_aliases(request.checkpoint.model_of([depth]))
        names = (f"blocks.{depth - 1}.post_stitch.fc.weight", "blocks.0.pre_stitch.fc.weight")
        stitch_size = kwargs.get("stitch_dim") or stitch_size_of(official, *names)
        for side, layer in (("pre", 0), ("post", depth - 1)):
            layers = kwargs.get(f"{side}_stitch_pos") or []
            if layers not in ([], [layer]):
                raise ConversionError(
                    f"`{side}_stitch_pos` is {layers}; a student has its {side} stitch at block {layer} or none."
                )
            if layers:
                expected.update(stitch_shapes(side, stitch_size, model.config.hidden_size, layer))
        check_tensors(official, expected, f"the student of stage {index}")
        tensors, stitches = convert_vmoe_student(official, offset)
        position = Position(index, num_stages, list(range(offset, offset + depth)))
        return stage_output(model, position, tensors, stitches, stitch_size)


def _kept_stitches(official: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side, shape_index in (("pre", 1), ("post", 0)):
        weights = {
            int(match[1]): tensor
            for name, tensor in official.items()
            if (match := re.fullmatch(rf"blocks\.(\d+)\.{side}_stitch\.fc\.weight", name))
        }
        if weights:
            found[f"{side}_stitch_pos"] = sorted(weights)
            found["stitch_dim"] = next(iter(weights.values())).shape[shape_index]
    return found


def norm_eps_of(content: Mapping[str, Any]) -> float:
    """Epsilon of the layer norms, which a configuration has to give. Raises `ConversionError`."""
    if content.get("norm_eps") is None:
        raise ConversionError(
            "the configuration has no `norm_eps`. The weights do not show it: 1e-6 in ViT-Large and all V-MoEs, 1e-5 "
            "in ViT-Huge."
        )
    return content["norm_eps"]
