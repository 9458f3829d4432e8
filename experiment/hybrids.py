"""Checks that the meta model and the teacher of a run share a feature space, which distillation needs."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from m2mkd.distillation.split import split_into_stages
from m2mkd.errors import RunError
from m2mkd.evaluation.hybrids import check_teacher, hybrid_accuracies, hybrids_sentence, judge_hybrids
from m2mkd.experiment.session import Results, Session


# Number of training images that hybrids are measured on if the test set has other classes.
HYBRID_IMAGES = 2_000


def measure_hybrids(
    session: Session, teacher: PreTrainedModel, meta: PreTrainedModel, indices: Sequence[int] | None = None
) -> Results:
    """
    Measure the accuracy of the hybrids on the IID test set if it has the distilled classes, otherwise on training
    images.

    Args:
        session (`Session`)
        teacher, meta (`PreTrainedModel`)
        indices (`Sequence[int]`, *optional*): Stages to swap in. `None`: all.

    Returns:
        The result of `hybrid_accuracies`, with a description of the images as `set`.
    """
    recipe, data = session.recipe, session.recipe.distill.data
    is_tested = session.data.shares_labels(recipe.evaluation.iid, session.data.class_names(data))
    images = session.test_set(recipe.evaluation.iid, data) if is_tested else None
    measured = hybrid_accuracies(
        split_into_stages(meta, session.meta_depths),
        split_into_stages(teacher, recipe.teacher.depths),
        range(len(session.depths)) if indices is None else indices,
        images or session.data.plain_set(data, HYBRID_IMAGES),
        session.eval_batch_size(),
        use_cpu=not torch.accelerator.is_available(),
    )
    return {**measured, "set": "IID test set" if is_tested else "training images"}


def check_hybrids(
    session: Session, teacher: PreTrainedModel, meta: PreTrainedModel, indices: Sequence[int]
) -> Results:
    """
    Measure the hybrids that pairs are distilled from, and print a warning that names the weak ones.

    Raises:
        `RunError`: one of them is noise.
    """
    measured = measure_hybrids(session, teacher, meta, indices)
    say_if_teacher_is_weak(session, measured)
    noise, weak = judge_hybrids(measured)
    if noise or weak:
        warning = (
            f"Warning: meta model and teacher do not share a feature space at stage {', '.join([*noise, *weak])}; "
            f"{hybrids_sentence(measured)}."
        )
        session.say(warning)
    if noise:
        raise RunError(
            f"{warning} The output of stage {', '.join(noise)} there is noise, so it is not distilled. Set "
            "`meta.init: from_teacher` (and leave out `meta.model`) to align the meta model with the teacher, or "
            "`distill.training.alpha: 0` to train the pairs only with the labels."
        )
    return measured


def say_if_teacher_is_weak(session: Session, measured: Results) -> None:
    """Print a warning if the teacher may not be better than chance. Raises `RunError` if it certainly is not."""
    warning = check_teacher(measured)
    if warning is not None:
        session.say(warning)
