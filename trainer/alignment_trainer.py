"""Trainer that aligns a meta model made from a teacher with the teacher's stage boundaries."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from m2mkd.distillation.losses import boundary_loss
from m2mkd.distillation.split import count_layers, split_into_stages
from m2mkd.distillation.transformer_stage import TransformerStage
from m2mkd.errors import StageError
from m2mkd.trainer.inputs import check_arguments, check_batch
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


class AlignmentTrainer(M2MKDTrainer):
    """
    Trains the layers of a meta model, made by `meta_from_teacher`, to reproduce the teacher's stage boundaries. Each
    stage maps the teacher's hidden states before the teacher's stage to those after it; the last stage maps to the
    logits. One pass through the teacher serves all stages. Embeddings, final norm and head stay the teacher's, and
    labels are not read.

    Args:
        model (`PreTrainedModel`): The meta model. Only its layers are trained.
        args (`M2MKDConfig`): `student_depths` cuts the meta model, `meta_depths` the teacher; `alpha` must be 0 and
            `stitch` `"none"`.
        teacher (`PreTrainedModel`): The teacher, which is frozen.
        arguments: The other arguments of [`M2MKDTrainer`]. `compute_metrics` gets the logits of the whole meta model.

    Raises:
        `StageError`: a network has no stages of transformer layers, `alpha` or `stitch` has another value, or the
            networks differ in width, token count or label space.
        `DataError`, `TypeError`: As in [`M2MKDTrainer`].
    """

    _statistic_names = ("loss",)

    def __init__(self, model: PreTrainedModel, args: Any, teacher: PreTrainedModel, **arguments: Any):
        check_arguments(args, model, teacher)
        if args.alpha != 0 or args.stitch != "none":
            raise StageError(
                f"`alpha` is {args.alpha} and `stitch` is {args.stitch!r}, but alignment uses neither labels nor "
                "stitches. Set `alpha=0` and `stitch='none'`."
            )
        for stage in split_into_stages(model, args.student_depths or [count_layers(model)]):
            if not isinstance(stage, TransformerStage):
                raise StageError(f"A {type(model).__name__} cannot be aligned; use a ViT, DeiT, DINOv2 or V-MoE.")
            stage.requires_grad_(False)
            for layer in stage.layers:
                layer.requires_grad_(True)
        # the teacher takes the role that the meta model has in distillation: its boundaries come from a frozen prefix
        super().__init__(model, args, meta=teacher, **arguments)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor | None]]:
        """
        Compute the sum of the stages' relative errors, see `boundary_loss`.

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
