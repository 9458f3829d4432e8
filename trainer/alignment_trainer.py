"""Trainer that aligns a meta model made from a teacher with the teacher's stage boundaries."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from m2mkd.distillation.frozen_networks import TeacherContext
from m2mkd.distillation.split import count_layers, split_into_stages
from m2mkd.distillation.transformer_stage import TransformerStage
from m2mkd.errors import StageError
from m2mkd.trainer.inputs import check_arguments
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
        super().__init__(model, args, meta=teacher, **arguments)
        # the teacher is the context and the target
        self.frozen = TeacherContext(list(self.frozen.meta), args.pair_indices)
        self._needed = ["pixel_values"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, as [`~transformers.Trainer.evaluation_loop`], the whole meta model too."""
        self._collect_weights()
        return super().evaluation_loop(*args, **kwargs)

    def _has_logits(self, index: int) -> bool:
        # the logits of the last stage are compared like the hidden states of the others
        return False

    def _logits(self, inputs: dict[str, Any], logits: list[torch.Tensor]) -> torch.Tensor | None:
        if self._given_metrics is None:
            return None
        with torch.no_grad():
            return self.student(inputs["pixel_values"]).logits
