"""A meta model made from a pretrained teacher: its embeddings, norm and head, and a few of its layers."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from m2mkd.distillation.sizes import pair, vision_config
from m2mkd.distillation.split import split_into_stages, stage_class
from m2mkd.errors import StageError


def meta_from_teacher(
    teacher: PreTrainedModel, teacher_depths: Sequence[int], meta_depths: Sequence[int]
) -> PreTrainedModel:
    """
    Build a model of the teacher's architecture and width with `sum(meta_depths)` layers. Embeddings, final norm and
    head are the teacher's; the layers of each stage start as the first layers of the teacher's stage. Train them with
    `AlignmentTrainer` to map each boundary between the teacher's stages to the next one. The result is the meta model
    of m2mKD, in the teacher's own feature space.

    Args:
        teacher (`PreTrainedModel`): A classifier that can be cut into stages and is no NAC.
        teacher_depths (`Sequence[int]`): Layers of each stage of the teacher.
        meta_depths (`Sequence[int]`): Layers of each stage of the meta model, no more than the teacher's.

    Returns:
        `PreTrainedModel`: In float32, on the teacher's device, sharing no tensor with it.

    Raises:
        `StageError`: the teacher cannot be cut this way, is a NAC, or has a stage with fewer layers than the meta
            model's.
    """
    if len(meta_depths) != len(teacher_depths) or any(
        own > theirs for own, theirs in zip(meta_depths, teacher_depths, strict=False)
    ):
        raise StageError(
            f"The meta model's depths are {list(meta_depths)} and the teacher's are {list(teacher_depths)}. The meta "
            "model needs as many stages as the teacher, none with more layers than the teacher's. Change the meta "
            "model's depths (in a recipe, `meta.depths`)."
        )
    theirs = split_into_stages(teacher, teacher_depths)
    if not stage_class(type(teacher)).is_meta_source:
        raise StageError(
            f"A meta model cannot be made from a {type(teacher).__name__}; use a ViT, DeiT, DINOv2 or V-MoE."
        )
    kept = [index for stage, depth in zip(theirs, meta_depths, strict=True) for index in stage.layer_indices[:depth]]
    config = stage_class(type(teacher)).shallow(teacher.config, kept)
    with torch.device(teacher.device):
        meta = type(teacher)(config).float()
    given = teacher.state_dict()
    # everything except the layers has the same names in both
    meta.load_state_dict({name: given.get(name, own) for name, own in meta.state_dict().items()}, strict=False)
    for own, stage in zip(split_into_stages(meta, meta_depths), theirs, strict=True):
        for layer, source in zip(own.layers, stage.layers, strict=False):
            layer.load_state_dict(source.state_dict(), strict=True)
    return meta


def fit_image_size(model: PreTrainedModel, image_size: int) -> None:
    """
    Adapt a pretrained transformer in place to square images of another size than it was trained on. Its
    position embeddings are interpolated once, as transformers does in each forward with
    `interpolate_pos_encoding=True` (some: always).

    Args:
        model (`PreTrainedModel`)
        image_size (`int`): Size in pixels.

    Raises:
        `StageError`: the image is not covered by whole patches.
    """
    architecture = stage_class(type(model))
    if not architecture.interpolates_positions:
        return
    sizes = vision_config(model.config)
    patch_size = set(pair(sizes.patch_size))
    if len(patch_size) > 1 or pair(sizes.image_size) == (image_size, image_size):
        return
    (patch,) = patch_size
    if image_size % patch:
        raise StageError(
            f"Images of {image_size} pixels cannot be divided into the teacher's patches of {patch} pixels. Set "
            f"`image_size` of the data to a multiple of {patch}."
        )
    architecture.resize(model, image_size)
