"""Checks of a trainer's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from m2mkd.distillation.checks import check_stitchable
from m2mkd.distillation.split import count_layers
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


def check_networks(
    args: M2MKDConfig, student: PreTrainedModel, teacher: PreTrainedModel | None, meta: PreTrainedModel | None
) -> None:
    """Check that the networks of a distillation are given and fit together. Raises `StageError`."""
    if args.alpha > 0 and teacher is None:
        raise StageError(f"`alpha` is {args.alpha}, but there is no teacher. Give one, or set `alpha=0`.")
    if args.num_pairs > 1 and meta is None:
        raise StageError(
            f"`student_depths` {args.student_depths} makes {args.num_pairs} pairs, but there is no meta model to put "
            "around them. Give `meta`, or leave `student_depths` out to train the student as a whole."
        )
    check_stitchable(student.config, teacher.config if teacher is not None else None, meta.config if meta else None)
    has_stitches = args.num_pairs > 1 and args.stitch != "none"
    if meta is not None and not has_stitches and student.config.hidden_size != meta.config.hidden_size:
        raise StageError(
            f"`stitch` is 'none', but the student is {student.config.hidden_size} wide and the meta model "
            f"{meta.config.hidden_size}. Choose 'layernorm_linear' or 'linear'."
        )
