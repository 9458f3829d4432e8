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
from m2mkd.modeling.stages import Stage, split_into_stages
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


# Of the way from chance to the teacher's own accuracy: a hybrid below the first share is noise, below the second weak.
NOISE, WEAK = 0.1, 0.5
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
        arguments: The others of [`M2MKDTrainer`].
    """

    def __init__(self, model: PreTrainedModel, args: Any, teacher: PreTrainedModel, **arguments: Any):
        for stage in split_into_stages(model, args.student_depths):
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
    ) -> torch.Tensor:
        """Sum of the stages' relative errors, see `boundary_loss`; of shape `()`."""
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
        return losses.sum()


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
        are weak (less than half the way). None of either if the teacher itself is no better than chance.
    """
    chance, own = measured["chance"], measured["teacher"]
    error = 2 * math.sqrt(chance * (1 - chance) / measured["n"])
    if own <= chance + error:
        return [], []
    way = {index: (accuracy - chance) / (own - chance) for index, accuracy in measured["hybrids"].items()}
    weak = [index for index, share in way.items() if share < WEAK]
    noise = [index for index in weak if way[index] < NOISE and way[index] + error / (own - chance) < WEAK]
    return noise, [index for index in weak if index not in noise]


def hybrids_sentence(measured: Hybrids) -> str:
    """The accuracies in words, against chance and the teacher's own."""
    each = ", ".join(f"{index}: {100 * accuracy:.1f} %" for index, accuracy in measured["hybrids"].items())
    return (
        f"accuracy of the meta model with one teacher stage in it, by stage: {each} (the teacher's own "
        f"{100 * measured['teacher']:.1f} %, chance {100 * measured['chance']:.1f} %, {measured['n']:,} images)"
    )
