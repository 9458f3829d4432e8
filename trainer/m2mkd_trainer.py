"""Trainer for the pairs of m2mKD: one prefix pass, the teacher's stages, stitched student stages, frozen suffixes."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor

from m2mkd.data.dataset import ImageDataset
from m2mkd.data.sampling import RepeatedSampler
from m2mkd.distillation.checks import num_special_tokens
from m2mkd.distillation.frozen_networks import FrozenNetworks
from m2mkd.distillation.losses import (
    hard_distillation_loss,
    per_sample_cross_entropy,
    per_sample_kl,
    soft_distillation_loss,
)
from m2mkd.distillation.pair_folder import tensors_sha256
from m2mkd.distillation.split import count_layers, split_into_stages
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.stitched_student import StitchedStudent
from m2mkd.errors import NonFiniteError
from m2mkd.trainer.inputs import check_arguments, check_batch, check_networks
from m2mkd.trainer.m2mkd_config import M2MKDConfig
from m2mkd.trainer.statistics_trainer import STATISTICS, StatisticsTrainer


class M2MKDTrainer(StatisticsTrainer):
    r"""
    Trainer for module-to-module distillation. For every pair `i` the student stage is trained between frozen layers of
    the meta model to match the teacher stage in the same place (m2mKD, arXiv 2402.16918, section 3):

        h   = M_{i-1} ∘ … ∘ M_1 (x)                                 one frozen pass for all pairs
        z_T = M_N ∘ … ∘ M_{i+1} ∘ T_i (h)                           no gradient
        z_S = M_N ∘ … ∘ M_{i+1} ∘ post_i ∘ S_i ∘ pre_i (h)          gradient into S_i, pre_i, post_i
        loss_i = (1 - alpha) CE(z_S, y) + alpha * (tau^2 KL(z_T/tau ‖ z_S/tau)  or  CE(z_S, argmax z_T))

    Training happens in place: after `train()` the given student holds the distilled stages. With `student_depths=None`
    the student is one stage, and the same trainer does ordinary distillation; with `alpha=0` no teacher is needed.

    Args:
        model (`PreTrainedModel`):
            The student. Like the other networks, it is an ordinary classifier that `split_into_stages` can cut. Only
            the stages of `args.pairs` are touched and moved to the device; the others may be on the meta device.
        args ([`M2MKDConfig`])
        teacher (`PreTrainedModel`, *optional*): Required if `args.alpha > 0`. It is frozen and, under mixed precision,
            cast to the compute dtype, in place; only the stages in use are kept.
        meta (`PreTrainedModel`, *optional*): Required if the student is cut into more than one stage. It is frozen
            like the teacher.
        data_collator, train_dataset, eval_dataset, processing_class, callbacks, optimizers: As in
            [`~transformers.Trainer`]. Data sets give `pixel_values` of shape `(num_channels, height, width)` and
            `labels`, a class index or a distribution over the classes.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): As in [`~transformers.Trainer`], in addition
            to the trainer's own statistics. `predictions` are the logits: of shape `(n, num_labels)` for a whole
            student, `(n, num_pairs, num_labels)` for pairs, which are in the order of `args.pairs`.

    Raises:
        `StageError`: the networks cannot be stitched (architectures, widths, token counts, label spaces, missing
            networks).
        `DataError`: a batch has no `pixel_values` or `labels`.
        `TypeError`: `args` is not an `M2MKDConfig`.
        `NonFiniteError`: a loss or gradient is not finite; the last good state is saved first.
    """

    # compute_loss returns the mean over the batch, so the Trainer divides by the accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: M2MKDConfig,
        teacher: PreTrainedModel | None = None,
        meta: PreTrainedModel | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: BaseImageProcessor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ):
        check_arguments(args, model, teacher, meta)
        check_networks(args, model, teacher, meta)
        indices = args.pair_indices
        student_stages = split_into_stages(model, args.student_depths or [count_layers(model)])
        stitch_size = (meta or teacher or model).config.hidden_size
        stitch = args.stitch if args.num_pairs > 1 else "none"
        meta_stages = split_into_stages(meta, args.meta_depths or [1] * args.num_pairs) if meta is not None else []
        teacher_stages = _teacher_stages(args, teacher)

        # computed before anything is cast; the contracts of the pairs identify the networks by them
        used = {"teacher": teacher if args.alpha > 0 else None, "meta": meta} if args.num_pairs > 1 else {}
        self.network_hashes = {
            f"{name}_sha256": tensors_sha256(network.state_dict())
            for name, network in used.items()
            if network is not None
        }
        self.student = model
        self.stitch_size = stitch_size
        self._step_of_seed, self._batch_in_step = -1, -1
        stitched = StitchedStudent(
            model,
            [student_stages[i] for i in indices],
            stitch_size,
            stitch,
            seed=args.seed,
            nac_codes=args.nac_codes,
            read_in_latents=args.read_in_latents,
            special_tokens=num_special_tokens(meta.config) if meta is not None else None,
        )
        self._is_stochastic = stitched.is_stochastic
        super().__init__(
            model=stitched,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = False
        # outside the module tree of `self.model`: nothing frozen reaches the optimizer, DDP or a checkpoint
        self.frozen = FrozenNetworks(meta_stages, teacher_stages).to(args.device, _compute_dtype(args))

    # ---- Forward and loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """
        Compute the sum of the pairs' losses. Their gradients do not mix, so each pair is trained as if it were alone.

        Returns:
            The loss of shape `()`; with `return_outputs` also the statistics of each image and pair, of shape
            `(batch_size, num_pairs * len(STATISTICS))`, and the logits, as `compute_metrics` gets them.
        """
        check_batch(inputs, ["pixel_values", "labels"])
        labels = inputs["labels"]
        pair_inputs = self.frozen.prefix(inputs["pixel_values"], self.args.pair_indices)
        teacher_logits = self.frozen.teacher_logits(pair_inputs)
        outputs = model(pair_inputs, seed=self._next_seed() if model.training else None)

        losses, statistics, all_logits = [], [], []
        for index, (hidden_states, balance) in outputs.items():
            logits = self.frozen.suffix(hidden_states, index)
            all_logits.append(logits.detach())
            teacher = teacher_logits.get(index)
            losses.append(self._pair_loss(logits, teacher, labels) + balance.get("aux_loss", 0.0))
            statistics.append(_statistics_of(logits.detach(), teacher, labels, self.args.temperature))
            if model.training:
                for name, value in balance.items():
                    self._add_statistic(index, name, value.detach())
        if model.training:
            self._stop_unless_finite(torch.stack(losses), "loss")
            for index, pair_loss, values in zip(outputs, losses, statistics, strict=True):
                self._add_statistic(index, "loss", pair_loss.detach())
                for name, value in zip(STATISTICS, values.mean(dim=0), strict=True):
                    self._add_statistic(index, name, value)
            self._num_batches += 1
        loss = torch.stack(losses).sum()
        if not return_outputs:
            return loss
        logits = torch.stack(all_logits, dim=1) if self.args.num_pairs > 1 else all_logits[0]
        return loss, (torch.cat(statistics, dim=1), logits)

    def _pair_loss(
        self, logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        alpha = self.args.alpha
        loss = per_sample_cross_entropy(logits, labels, self.args.label_smoothing_factor).mean()
        if teacher_logits is None:
            return loss
        if self.args.distillation_type == "hard":
            distillation = hard_distillation_loss(logits, teacher_logits)
        else:
            distillation = soft_distillation_loss(
                logits, teacher_logits, self.args.temperature, self.args.kl_reduction
            )
        return (1 - alpha) * loss + alpha * distillation

    def _next_seed(self) -> int | None:
        """Seed of this micro-batch's random numbers, the same in a resumed run; `None` if none are drawn."""
        if not self._is_stochastic:
            return None
        if self._step_of_seed != self.state.global_step:
            self._step_of_seed, self._batch_in_step = self.state.global_step, -1
        self._batch_in_step += 1
        batch = self.state.global_step * self.args.gradient_accumulation_steps + self._batch_in_step
        return (self.args.seed * 1_000_003 + batch) * self.args.world_size + self.args.process_index

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, ImageDataset) and dataset.config.repeated > 1:
            return RepeatedSampler(dataset, self.args.seed, self.args.world_size, self._train_batch_size)
        return super()._get_train_sampler(train_dataset)

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """
        Return statistics of each image instead of predictions, so that means over the whole set are exact. With
        `compute_metrics`, the logits follow them.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, (statistics, logits) = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        predictions = statistics.float() if self._given_metrics is None else (statistics.float(), logits.float())
        return loss, predictions, inputs.get("labels")

    # ---- Steps ----

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip each pair by its own norm, as if it were trained alone. Returns the norm of all before clipping."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        # once for all pairs: the loss scaler of fp16 refuses to do it twice
        self.accelerator.unscale_gradients()
        clip, limit = nn.utils.clip_grad_norm_, self.args.max_grad_norm
        norms = [clip(list(pair.parameters()), limit) for pair in self.trained_pairs().values()]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # with a loss scaler (fp16) a gradient that overflows is expected: the step is skipped and the scale lowered
        if self.accelerator.scaler is None and grad_norm is not None:
            self._stop_unless_finite(torch.as_tensor(grad_norm, device=self.args.device).reshape(1), "gradient norm")
        return grad_norm

    def _stop_unless_finite(self, values: torch.Tensor, what: str) -> None:
        """Raise on every process if `values` (of shape `(num_pairs,)` or `(1,)`) are not finite on any of them."""
        bad = (~torch.isfinite(values.detach())).float()
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        if not bad.any():
            return
        pairs = [i for i, is_bad in zip(self.args.pair_indices, bad.tolist(), strict=False) if is_bad]
        named = self.args.num_pairs > 1 and len(values) == len(self.args.pair_indices)
        where = f"of pair {', '.join(map(str, pairs))} " if named else ""
        saved = self._save_last_good_state()
        raise NonFiniteError(
            f"The {what} {where}is not finite at step {self.state.global_step}, learning rate "
            f"{self._get_learning_rate():.3g}. {saved} Lower `learning_rate` (or `max_grad_norm`, now "
            f"{self.args.max_grad_norm}), or use bf16 instead of fp16, and start again."
        )

    def _save_last_good_state(self) -> str:
        # the weights are those before this step's update
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            return "The weights are not finite either, so they were not saved; earlier checkpoints are untouched."
        self._save_checkpoint(self.model, trial=None)
        return f"The last good state is {Path(self.args.output_dir) / f'checkpoint-{self.state.global_step}'}."


def _teacher_stages(args: M2MKDConfig, teacher: PreTrainedModel | None) -> dict[int, Stage]:
    """The teacher stages that the pairs need, by index."""
    if teacher is None or args.alpha == 0:
        return {}
    stages = split_into_stages(teacher, args.teacher_depths or [count_layers(teacher)])
    return {index: stages[index] for index in args.pair_indices}


def _compute_dtype(args: M2MKDConfig) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _statistics_of(
    logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Statistics of shape `(batch_size, len(STATISTICS))`; without a teacher, those that need one are NaN."""
    prediction = logits.argmax(dim=-1)
    target = labels if labels.ndim == 1 else labels.argmax(dim=-1)
    cross_entropy = per_sample_cross_entropy(logits, labels)
    unknown = torch.full_like(cross_entropy, math.nan)
    kl = unknown if teacher_logits is None else per_sample_kl(logits, teacher_logits, temperature)
    agreement = unknown if teacher_logits is None else (prediction == teacher_logits.argmax(dim=-1)).float()
    return torch.stack([cross_entropy, (prediction == target).float(), kl, agreement], dim=1)
