"""
Meta model and teacher in one feature space: a meta model aligned with a pretrained teacher, and the accuracy of the
hybrids, the meta model with one stage of the teacher in it, which tells whether they share one.
"""

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from m2mkd.modeling.frozen_networks import FrozenNetworks
from m2mkd.modeling.losses import boundary_loss
from m2mkd.modeling.stages import Stage, StageError, TransformerStage, count_layers, split_into_stages
from m2mkd.trainer.folders import RunError
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer, check_arguments, check_batch


# Of the way from chance to the teacher's own accuracy: a hybrid below the first share is noise, below the second weak.
NOISE, WEAK = 0.1, 0.5
# On fewer images a teacher may be no better than chance by bad luck.
ENOUGH_IMAGES = 100
Hybrids = dict[str, Any]


class AlignmentTrainer(M2MKDTrainer):
    """
    Trains the layers of a meta model, made by `meta_from_teacher`, to reproduce the teacher's stage boundaries: each
    stage maps the teacher's hidden states before its stage to those behind it, the last one to the logits. One pass
    through the teacher serves all stages; embeddings, final norm and head stay the teacher's; labels are not read.

    Args:
        model (`PreTrainedModel`): The meta model; its layers alone are trained.
        args (`M2MKDConfig`): `student_depths` cuts the meta model, `meta_depths` the teacher; `alpha` must be 0 and
            `stitch` `"none"`.
        teacher (`PreTrainedModel`): Frozen.
        arguments: The others of [`M2MKDTrainer`]. `compute_metrics` is given the logits of the whole meta model.

    Raises:
        `StageError`: a network has no stages of transformer layers, `alpha` or `stitch` is another, or the networks
            differ in width, token count or label space.
        `DataError`, `TypeError`: As of [`M2MKDTrainer`].
    """

    _statistic_names = ("loss",)

    def __init__(self, model: PreTrainedModel, args: Any, teacher: PreTrainedModel, **arguments: Any):
        check_arguments(args, model, teacher)
        if args.alpha != 0 or args.stitch != "none":
            raise StageError(
                f"`alpha` is {args.alpha} and `stitch` {args.stitch!r}, but alignment has neither labels nor "
                "stitches. Set `alpha=0` and `stitch='none'`."
            )
        for stage in split_into_stages(model, args.student_depths or [count_layers(model)]):
            if not isinstance(stage, TransformerStage):
                raise StageError(f"A {type(model).__name__} cannot be aligned; use a ViT, DeiT, DINOv2 or V-MoE.")
            stage.requires_grad_(False)
            for layer in stage.layers:
                layer.requires_grad_(True)
        # its boundaries are those of a frozen prefix: the teacher stands where the meta model does in distillation
        super().__init__(model, args, meta=teacher, **arguments)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor | None]]:
        """
        Sum of the stages' relative errors, see `boundary_loss`.

        Returns:
            The loss of shape `()`; with `return_outputs` also the errors of the stages, of shape
            `(batch_size, num_pairs)`, the same for each image, and the logits of the whole meta model if
            `compute_metrics` was given.
        """
        check_batch(inputs, ["pixel_values"])
        boundaries = self.frozen.prefix(inputs["pixel_values"], self.args.pair_indices)
        last = self.args.num_pairs - 1
        with torch.no_grad():
            targets = [*list(boundaries.values())[1:], self.frozen.meta[last](boundaries[last])]
        outputs = model(boundaries, seed=self._next_seed() if model.training else None)
        losses = torch.stack([boundary_loss(states, targets[index]) for index, (states, _) in outputs.items()])
        if model.training:
            self._stop_unless_finite(losses, "loss")
            for index, loss in zip(outputs, losses.detach(), strict=True):
                self._add_statistic(index, "loss", loss)
            self._num_batches += 1
        if not return_outputs:
            return losses.sum()
        with torch.no_grad():
            logits = None if self._given_metrics is None else self.student(inputs["pixel_values"]).logits
        return losses.sum(), (losses.detach().expand(len(inputs["pixel_values"]), -1), logits)


def hybrid_accuracies(
    meta: Sequence[Stage],
    teacher: Sequence[Stage],
    indices: Sequence[int],
    dataset: Dataset,
    batch_size: int,
    use_cpu: bool,
) -> Hybrids:
    """
    Accuracy of the meta model with one stage of the teacher in it, `M_N ∘ … ∘ M_{i+1} ∘ T_i ∘ M_{i-1} ∘ … ∘ M_1`: the
    network whose logits a pair is distilled from. Both networks are put into evaluation mode.

    Args:
        meta, teacher (`Sequence[Stage]`): All stages of both networks.
        indices (`Sequence[int]`): Stages to swap in, one at a time, counted from 0.
        dataset (`Dataset`): Gives `pixel_values` and `labels`. If it has some of the networks' classes only, the
            others are left out, as in every evaluation.
        batch_size (`int`): Images a device.
        use_cpu (`bool`): Stay on the CPU.

    Returns:
        `hybrids` (accuracy in [0, 1] by index as text), `teacher` (its own accuracy), `chance` (share of the most
        frequent class) and the number of images `n`.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            use_cpu=use_cpu,
            dataloader_pin_memory=not use_cpu,
            report_to="none",
            disable_tqdm=True,
            # no model of transformers says which columns it takes, and which of them hold labels
            remove_unused_columns=False,
            label_names=["labels"],
        )
        possible = getattr(dataset, "possible", None)
        trainer = Trainer(_Hybrids(meta, teacher, indices, possible), args=args)
        trainer.remove_callback(PrinterCallback)
        found = trainer.predict(dataset)
    accuracies = found.predictions.mean(axis=0).tolist()
    labels = torch.as_tensor(found.label_ids)
    return {
        "hybrids": {str(index): accuracy for index, accuracy in zip(indices, accuracies, strict=False)},
        "teacher": accuracies[-1],
        "chance": labels.bincount().max().item() / len(labels),
        "n": len(labels),
    }


class _Hybrids(nn.Module):
    """Which images each hybrid, and last the teacher, gets right: `(batch_size, num_hybrids + 1)` of 0 and 1."""

    def __init__(
        self, meta: Sequence[Stage], teacher: Sequence[Stage], indices: Sequence[int], possible: np.ndarray | None
    ):
        super().__init__()
        self.indices = indices
        self.possible = None if possible is None else torch.from_numpy(possible)
        self.frozen = FrozenNetworks(meta, {index: teacher[index] for index in indices})
        self.teacher = nn.ModuleList(teacher).eval()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.frozen.teacher_logits(self.frozen.prefix(pixel_values, self.indices))
        own = pixel_values
        for stage in self.teacher:
            own = stage(own)
        right = [(self._predict(z) == labels).float() for z in [*logits.values(), own]]
        return right[-1].mean(), torch.stack(right, dim=1)

    def _predict(self, logits: torch.Tensor) -> torch.Tensor:
        if self.possible is None:
            return logits.argmax(dim=-1)
        possible = self.possible.to(logits.device)
        return possible[logits[:, possible].argmax(dim=-1)]


def judge_hybrids(measured: Hybrids) -> tuple[list[str], list[str]]:
    """
    Which hybrids are too poor to be distilled from. An accuracy is known to two standard errors.

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
    Whether the teacher itself is better than chance, to two standard errors.

    Args:
        measured (`dict`): From [`hybrid_accuracies`], with the name of the images as `set`.

    Returns:
        `str`, *optional*: A warning if it is not, but there are too few images to be sure.

    Raises:
        `RunError`: it is not.
    """
    if not _is_at_chance(measured):
        return None
    found = (
        f"the teacher is right on {100 * measured['teacher']:.1f} % of {measured['n']:,} images ({measured['set']}), "
        f"which is no better than chance ({100 * measured['chance']:.1f} %)"
    )
    if measured["n"] < ENOUGH_IMAGES:
        return f"Warning: {found}; these are too few images to be sure."
    raise RunError(
        f"Nothing can be learned from this teacher: {found}. Train it longer, or use another teacher. If it is a "
        "published one, check that its classes are those of the data, in the same order."
    )


def _is_at_chance(measured: Hybrids) -> bool:
    return measured["teacher"] <= measured["chance"] + _error_of_chance(measured)


def _error_of_chance(measured: Hybrids) -> float:
    """Two standard errors."""
    return 2 * math.sqrt(measured["chance"] * (1 - measured["chance"]) / measured["n"])


def hybrids_sentence(measured: Hybrids) -> str:
    """The accuracies in words, against chance and the teacher's own."""
    each = ", ".join(f"{index}: {100 * accuracy:.1f} %" for index, accuracy in measured["hybrids"].items())
    return (
        f"accuracy of the meta model with one teacher stage in it, by stage: {each} (the teacher's own "
        f"{100 * measured['teacher']:.1f} %, chance {100 * measured['chance']:.1f} %, {measured['n']:,} images)"
    )
