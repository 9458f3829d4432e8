"""Checks of a trainer's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from m2mkd.distillation.checks import check_stitchable
from m2mkd.distillation.sizes import vision_config
from m2mkd.distillation.split import check_can_be_cut, count_layers, stage_class
from m2mkd.distillation.target_cache import TargetCache
from m2mkd.errors import DataError, StageError
from m2mkd.trainer.m2mkd_config import M2MKDConfig


def check_arguments(args: Any, *networks: PreTrainedModel | None) -> None:
    """
    Check the arguments and networks of a trainer of stages before anything else reads them.

    Raises:
        `TypeError`: `args` is not an `M2MKDConfig`.
        `StageError`: a network cannot be cut into stages.
    """
    if not isinstance(args, M2MKDConfig):
        raise TypeError(
            f"`args` is of type {type(args).__name__}, but this trainer needs an `M2MKDConfig`: the arguments of "
            "`TrainingArguments` and those of the distillation, with defaults. Use `M2MKDConfig(...)` instead."
        )
    for network in networks:
        if network is not None:
            count_layers(network)


def check_batch(inputs: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `DataError` if a batch lacks one of `names`."""
    missing = [name for name in names if name not in inputs]
    if missing:
        raise DataError(
            f"The batches have {', '.join(sorted(inputs)) or 'nothing'}, but not {' and '.join(missing)}. Each item "
            "of the data set must have `pixel_values`, of shape (num_channels, height, width), and `labels`. Prepare "
            "it with the image processor, e.g. with `with_transform` of `datasets`, or give a `data_collator`."
        )


def check_cache(
    args: M2MKDConfig,
    targets: TargetCache,
    teacher: PreTrainedModel | None,
    meta: PreTrainedModel | None,
    eval_dataset: Any,
) -> None:
    """Check that a cache serves a distillation. Raises `StageError` or, if it was cut otherwise, `CacheError`."""
    is_evaluated = eval_dataset is not None and args.num_pairs > 1
    if teacher is not None or meta is not None or is_evaluated:
        given = "a teacher" if teacher is not None else "a meta model" if meta is not None else "an `eval_dataset`"
        raise StageError(
            f"`targets` take the place of the teacher for the training set, but {given} is given as well. Leave out "
            "one of them."
        )
    if not args.uses_teacher:
        raise StageError("`targets` are given, but `alpha` is 0, so nothing reads them. Leave out one of them.")
    if args.num_pairs == 1:
        return
    if args.context != "teacher" or args.match != "boundary":
        raise StageError(
            f"`context` is {args.context!r} and `match` is {args.match!r}, so the outputs of the pairs pass through "
            "frozen layers, whose results cannot be stored beforehand. Set `context='teacher'` and "
            "`match='boundary'`, or leave out `targets`."
        )
    targets.check(depths=args.teacher_depths)


def check_networks(
    args: M2MKDConfig, student: PreTrainedModel, teacher: PreTrainedModel | None, meta: PreTrainedModel | None
) -> None:
    """Check that the networks of a distillation are given and fit together. Raises `StageError`."""
    if args.alpha > 0 and teacher is None:
        raise StageError(f"`alpha` is {args.alpha}, but there is no teacher. Give one, or set `alpha=0`.")
    if args.num_pairs > 1:
        for network in (student, teacher, meta):
            if network is not None:
                check_can_be_cut(network)
        _check_context(args, teacher, meta)
    context = teacher if args.context == "teacher" else meta
    if args.num_pairs > 1 and context is None:
        raise StageError(
            f"`student_depths` {args.student_depths} makes {args.num_pairs} pairs, but there is no meta model to put "
            "around them. Give `meta`, or leave `student_depths` out to train the student as a whole."
        )
    around = context if args.num_pairs > 1 else meta
    check_stitchable(
        student.config, teacher.config if teacher is not None else None, around.config if around is not None else None
    )
    has_stitches = args.num_pairs > 1 and args.stitch != "none"
    widths = [vision_config(network.config).hidden_size for network in (student, around) if network is not None]
    if not has_stitches and len(set(widths)) == 2:
        raise StageError(
            f"`stitch` is 'none', but the student is {widths[0]} wide and the {args.context} "
            f"{'model ' if args.context == 'meta' else ''}{widths[1]}. Choose 'layernorm_linear' or 'linear'."
        )


def _check_context(args: M2MKDConfig, teacher: PreTrainedModel | None, meta: PreTrainedModel | None) -> None:
    """Check that the pairs get their inputs and targets from a network that has them."""
    if args.context == "teacher" and meta is not None:
        raise StageError(
            "`context` is 'teacher', so the pairs are trained inside the teacher, but a meta model is given as well. "
            "Leave `meta` out, or set `context='meta'`."
        )
    if args.uses_teacher and teacher is None:
        raise StageError(
            f"`context` is {args.context!r} and `match` is {args.match!r}, which need a teacher, but there is none. "
            "Give one, or set `context='meta'` and `match='logits'`."
        )
    if args.stitch_init == "least_squares" and not args.uses_teacher:
        raise StageError(
            "`stitch_init` is 'least_squares', which fits the stitches to the teacher's hidden states, but `alpha` is "
            "0, so there is no teacher. Set `stitch_init='random'`, or a larger `alpha`."
        )
    if args.match == "boundary" and not stage_class(type(teacher)).is_meta_source:
        raise StageError(
            f"`match` is 'boundary', but the hidden states of the teacher, a {type(teacher).__name__}, are not tokens "
            "of an image that a module could match. Set `match='logits'`, or use a ViT, DeiT, DINOv2 or V-MoE."
        )
