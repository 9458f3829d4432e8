"""
Hybrids: the meta model with one of its stages replaced by the teacher's. Their accuracy shows whether meta model and
teacher share a feature space.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from m2mkd.distillation.frozen_networks import FrozenNetworks
from m2mkd.distillation.stage import Stage
from m2mkd.errors import RunError
from m2mkd.evaluation.predict import among, run_over


# Fractions of the way from chance to the teacher's own accuracy: a hybrid below the first is noise, below the second
# it is weak.
NOISE, WEAK = 0.1, 0.5
# On fewer images, a teacher may fail to beat chance by bad luck.
ENOUGH_IMAGES = 100
Hybrids = dict[str, Any]


def hybrid_accuracies(
    meta: Sequence[Stage],
    teacher: Sequence[Stage],
    indices: Sequence[int],
    dataset: Dataset,
    batch_size: int,
    use_cpu: bool,
) -> Hybrids:
    """
    Measure the accuracy of the meta model with one stage of the teacher in it,
    `M_N ∘ … ∘ M_{i+1} ∘ T_i ∘ M_{i-1} ∘ … ∘ M_1`: the network whose logits a pair is distilled from. Both networks are
    put into evaluation mode.

    Args:
        meta, teacher (`Sequence[Stage]`): All stages of both networks.
        indices (`Sequence[int]`): Stages to swap in, one at a time, counted from 0.
        dataset (`Dataset`): Gives `pixel_values` and `labels`. If it has only some of the networks' classes, the
            others are left out, as in every evaluation.
        batch_size (`int`): Images per device.
        use_cpu (`bool`): Whether to stay on the CPU.

    Returns:
        `hybrids` (accuracy in [0, 1] by index as text), `teacher` (its own accuracy), `chance` (fraction of the most
        frequent class) and the number of images `n`.
    """
    hybrids = _Hybrids(meta, teacher, indices, getattr(dataset, "possible", None))
    found = run_over(hybrids, dataset, batch_size, use_cpu)
    accuracies = found.predictions.mean(axis=0).tolist()
    labels = torch.as_tensor(found.label_ids)
    return {
        "hybrids": {str(index): accuracy for index, accuracy in zip(indices, accuracies, strict=False)},
        "teacher": accuracies[-1],
        "chance": labels.bincount().max().item() / len(labels),
        "n": len(labels),
    }


class _Hybrids(nn.Module):
    """
    Computes which images each hybrid, and last the teacher, classifies correctly: `(batch_size, num_hybrids + 1)` of 0
    and 1.
    """

    def __init__(
        self, meta: Sequence[Stage], teacher: Sequence[Stage], indices: Sequence[int], possible: np.ndarray | None
    ):
        super().__init__()
        self.indices, self.possible = indices, possible
        self.frozen = FrozenNetworks(meta, {index: teacher[index] for index in indices})
        self.teacher = nn.ModuleList(teacher).eval()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, logits = self.frozen.inputs_and_targets({"pixel_values": pixel_values}, self.indices)
        own = pixel_values
        for stage in self.teacher:
            own = stage(own)
        predicted = [among(z, self.possible).argmax(dim=-1) for z in [*logits.values(), own]]
        right = [(each == labels).float() for each in predicted]
        return right[-1].mean(), torch.stack(right, dim=1)


def judge_hybrids(measured: Hybrids) -> tuple[list[str], list[str]]:
    """
    Find the hybrids that are too poor to be distilled from. An accuracy is known to two standard errors.

    Args:
        measured (`dict`): From [`hybrid_accuracies`].

    Returns:
        `list[str]`, `list[str]`: Indices of the hybrids that are noise (less than a tenth of the way from chance to
        the teacher's own accuracy, measured on enough images to tell that from half the way) and of the others that
        are weak (less than half the way). None of either if the teacher itself is no better than chance, see
        [`check_teacher`].
    """
    chance, own = measured["chance"], measured["teacher"]
    if _is_at_chance(measured):
        return [], []
    error = _error_of_chance(measured)
    way = {index: (accuracy - chance) / (own - chance) for index, accuracy in measured["hybrids"].items()}
    weak = [index for index, share in way.items() if share < WEAK]
    noise = [index for index in weak if way[index] < NOISE and way[index] + error / (own - chance) < WEAK]
    return noise, [index for index in weak if index not in noise]


def check_teacher(measured: Hybrids) -> str | None:
    """
    Check that the teacher itself is better than chance, to two standard errors.

    Args:
        measured (`dict`): From [`hybrid_accuracies`], with the name of the images as `set`.

    Returns:
        `str`, *optional*: A warning if it is not, but there are too few images to be sure.

    Raises:
        `RunError`: it is not better.
    """
    if not _is_at_chance(measured):
        return None
    found = (
        f"the teacher is right on {100 * measured['teacher']:.1f} % of {measured['n']:,} images ({measured['set']}), "
        f"which is not better than chance ({100 * measured['chance']:.1f} %)"
    )
    if measured["n"] < ENOUGH_IMAGES:
        return f"Warning: {found}, but these are too few images to be sure."
    raise RunError(
        f"Nothing can be learned from this teacher: {found}. Train it longer, or use another teacher. If it is a "
        "published teacher, check that its classes are those of the data, in the same order."
    )


def _is_at_chance(measured: Hybrids) -> bool:
    return measured["teacher"] <= measured["chance"] + _error_of_chance(measured)


def _error_of_chance(measured: Hybrids) -> float:
    """Two standard errors."""
    return 2 * math.sqrt(measured["chance"] * (1 - measured["chance"]) / measured["n"])


def hybrids_sentence(measured: Hybrids) -> str:
    """Describe the accuracies as text, with chance and the teacher's own accuracy."""
    each = ", ".join(f"{index}: {100 * accuracy:.1f} %" for index, accuracy in measured["hybrids"].items())
    return (
        f"accuracy of the meta model with one teacher stage in it, by stage: {each} (the teacher's own "
        f"{100 * measured['teacher']:.1f} %, chance {100 * measured['chance']:.1f} %, {measured['n']:,} images)"
    )
