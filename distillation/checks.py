"""Checks that networks can exchange hidden states and be compared."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from m2mkd.distillation.sizes import num_special_tokens, patch_grid, vision_config
from m2mkd.distillation.split import stage_class_of
from m2mkd.errors import StageError


def num_tokens(config: PreTrainedConfig) -> int:
    """Number of tokens in a model's hidden states: its special tokens and its patches."""
    return num_special_tokens(config) + _num_patches(config)


def _num_patches(config: PreTrainedConfig) -> int:
    return math.prod(patch_grid(config))


def check_stitchable(
    student: PreTrainedConfig, teacher: PreTrainedConfig | None, meta: PreTrainedConfig | None
) -> None:
    """
    Check that the three networks can exchange hidden states and be compared on one label space.

    Args:
        student, teacher, meta (`PreTrainedConfig`): `None` for a network that does not take part.

    Raises:
        `StageError`: teacher and meta model differ in width or special tokens, or two networks differ in patches or
            label space.
    """
    widths = [
        vision_config(config).hidden_size for config in (teacher, meta) if config is not None and meta is not None
    ]
    if len(set(widths)) == 2:
        raise StageError(
            f"The teacher is {widths[0]} wide and the meta model {widths[1]}; their modules exchange "
            "hidden states without a stitch, so `hidden_size` must be equal (stitches are for the student)."
        )
    if teacher is not None and meta is not None and num_special_tokens(teacher) != num_special_tokens(meta):
        raise StageError(
            "The number of tokens before the patches must be equal, because the modules exchange hidden states "
            f"without a stitch: the teacher (a {teacher.model_type}) has {num_special_tokens(teacher)} and the meta "
            f"model (a {meta.model_type}) {num_special_tokens(meta)}. Use a meta model of the teacher's architecture, "
            "e.g. one made with `meta_from_teacher` (in a recipe, `meta.init: from_teacher`)."
        )
    for name, other in (("teacher", teacher), ("meta model", meta)):
        if other is None:
            continue
        is_free = meta is None or stage_class_of(student).takes_any_tokens
        if not is_free and _num_patches(student) != _num_patches(other):
            ours, theirs = vision_config(student), vision_config(other)
            raise StageError(
                f"The student has {_num_patches(student)} patches (image_size {ours.image_size}, patch_size "
                f"{ours.patch_size}) and the {name} {_num_patches(other)} (image_size {theirs.image_size}, "
                f"patch_size {theirs.patch_size}); stitches change the width, not the number of patches. Give them "
                "the same grid."
            )
        _check_label_space(student, other, name)


def _check_label_space(student: PreTrainedConfig, other: PreTrainedConfig, name: str) -> None:
    if student.num_labels != other.num_labels:
        raise StageError(
            f"The student has {student.num_labels} classes and the {name} {other.num_labels}; the distillation loss "
            "compares them class by class. Use networks with the same label space."
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


def check_same_normalization(first: Any, second: Any, names: tuple[str, str], any_size: bool = False) -> None:
    """
    Check that two image processors feed their networks the same pixels, because both networks see the same batch.

    Args:
        first, second (image processors of transformers)
        names (`tuple[str, str]`): Names of their networks in the message.
        any_size (`bool`): Whether the sizes may differ.

    Raises:
        `StageError`: mean, standard deviation, rescaling or size differ.
    """
    fields = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "size")
    for field in fields[:-1] if any_size else fields:
        ours, theirs = (getattr(processor, _final(field, processor), None) for processor in (first, second))
        if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
            ours, theirs = list(ours), list(theirs)
        if ours != theirs:
            raise StageError(
                f"The image processors of the {names[0]} and the {names[1]} differ in `{field}`: {ours} and {theirs}. "
                "Both networks see the same batch, so set the data's `mean`, `std` and `image_size` to the teacher's."
            )


def _final(field: str, processor: Any) -> str:
    """Name of the field with the final image size: after a resize, the center may be cropped."""
    return "crop_size" if field == "size" and getattr(processor, "do_center_crop", None) else field


def take_class_names(config: PreTrainedConfig, class_names: Sequence[str]) -> None:
    """
    Give the classes of a published network the names of the data's classes, in order, if their number is the same and
    they share no name: the Hub has other names for ImageNet's classes. The accuracy shows whether the order is right.

    Args:
        config (`PreTrainedConfig`): Changed in place.
        class_names (`Sequence[str]`): Class names of the data.
    """
    if len(class_names) == config.num_labels and set(class_names).isdisjoint(config.id2label.values()):
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
