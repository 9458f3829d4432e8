"""Trainer for the pairs of m2mKD: one prefix pass, the teacher's stages, stitched student stages, frozen suffixes."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import TrainOutput

from m2mkd.data.dataset import ImageDataset
from m2mkd.data.sampling import RepeatedSampler
from m2mkd.distillation.frozen_networks import FrozenNetworks, TeacherContext
from m2mkd.distillation.losses import (
    boundary_loss,
    hard_distillation_loss,
    per_sample_boundary_error,
    per_sample_cross_entropy,
    per_sample_kl,
    pool_tokens,
    soft_distillation_loss,
)
from m2mkd.distillation.pair_folder import tensors_sha256
from m2mkd.distillation.sizes import num_special_tokens, vision_config
from m2mkd.distillation.split import count_layers, split_into_stages
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.stitch_init import FITTED_IMAGES, fit_stitches
from m2mkd.distillation.stitched_student import StitchedStudent
from m2mkd.distillation.target_cache import CachedTargets, TargetCache
from m2mkd.errors import NonFiniteError
from m2mkd.trainer.cached_images import CachedImages
from m2mkd.trainer.inputs import check_arguments, check_batch, check_cache, check_networks
from m2mkd.trainer.m2mkd_config import M2MKDConfig
from m2mkd.trainer.sharding import whole_tensor
from m2mkd.trainer.statistics_trainer import STATISTICS, StatisticsTrainer


class M2MKDTrainer(StatisticsTrainer):
    r"""
    Trainer for module-to-module distillation. For every pair `i` the student stage is trained between frozen layers of
    the meta model to match the teacher stage in the same place (m2mKD, arXiv 2402.16918, section 3):

        h   = M_{i-1} ∘ … ∘ M_1 (x)                                 one frozen pass for all pairs
        z_T = M_N ∘ … ∘ M_{i+1} ∘ T_i (h)                           no gradient
        z_S = M_N ∘ … ∘ M_{i+1} ∘ post_i ∘ S_i ∘ pre_i (h)          gradient into S_i, pre_i, post_i
        loss_i = (1 - alpha) CE(z_S, y) + alpha * (tau^2 KL(z_T/tau ‖ z_S/tau)  or  CE(z_S, argmax z_T))

    With `context="teacher"`, the teacher takes the role of M, and with `match="boundary"` the loss compares
    post_i ∘ S_i ∘ pre_i (h) with T_i (h) itself (`boundary_loss`; for the last pair the logits, as above).

    Training happens in place: after `train()` the given student holds the distilled stages. With `student_depths=None`
    the student is one stage, and the same trainer does ordinary distillation; with `alpha=0` no teacher is needed.

    Args:
        model (`PreTrainedModel`):
            The student. Like the other networks, it is an ordinary classifier that `split_into_stages` can cut. Only
            the stages of `args.pairs` are touched and moved to the device; the others may be on the meta device.
        args ([`M2MKDConfig`]): What is trained, and how.
        teacher (`PreTrainedModel`, *optional*): Required if `args.alpha > 0`, `args.context` is `"teacher"` or
            `args.match` is `"boundary"`. It is frozen and, under mixed precision, cast to the compute dtype, in place;
            only the stages in use are kept.
        meta (`PreTrainedModel`, *optional*): Required if the student is cut into more than one stage, unless
            `args.context` is `"teacher"`. It is frozen like the teacher.
        data_collator, train_dataset, eval_dataset, processing_class, callbacks, optimizers: As in
            [`~transformers.Trainer`]. Data sets give `pixel_values` of shape `(num_channels, height, width)` and
            `labels`, a class index or a distribution over the classes.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): As in [`~transformers.Trainer`], in addition
            to the trainer's own statistics. `predictions` are the logits: of shape `(n, num_labels)` for a whole
            student, `(n, num_pairs, num_labels)` for pairs, which are in the order of `args.pairs`. With
            `match="boundary"`, they are those of the last pair, of shape `(n, num_labels)`.
        targets ([`TargetCache`], *optional*): What the teacher would compute, stored beforehand: `TargetCache.write(
            folder, teacher, args.teacher_depths, train_dataset)` writes it, `TargetCache(folder)` opens it in any
            process. It takes the place of `teacher`, which is then neither loaded nor run. It serves ordinary
            distillation, and pairs with `context="teacher"` and `match="boundary"`, on the `ImageDataset` that it was
            written for; a process reads only what its own pairs need. It has no targets for an `eval_dataset`: pairs
            cannot be evaluated with it, and a whole student only by the labels (`eval_loss` is their cross entropy).

    Raises:
        `StageError`: the networks cannot be stitched (architectures, widths, token counts, label spaces, missing
            networks), or the cache does not serve them.
        `CacheError`: the cache is damaged, or was written for another data set.
        `DataError`: a batch has no `pixel_values`, or no `labels` although `args.alpha` is less than 1.
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
        targets: TargetCache | None = None,
    ):
        check_arguments(args, model, teacher, meta)
        if targets is not None:
            check_cache(args, targets, teacher, meta, eval_dataset)
            teacher = targets.teacher()
        check_networks(args, model, teacher, meta)
        student_stages = split_into_stages(model, args.student_depths or [count_layers(model)])
        around = meta or (teacher if args.num_pairs > 1 else None) or model
        frozen = _frozen_networks(args, teacher, meta, targets is not None)
        if targets is not None and train_dataset is not None:
            train_dataset = CachedImages(train_dataset, targets, frozen.names(args.pair_indices))
        # computed before anything is cast
        self.network_hashes = _network_hashes(args, teacher, meta, targets)
        self.student = model
        self.stitch_size = vision_config(around.config).hidden_size
        self._step_of_seed, self._batch_in_step = -1, -1
        self._needed = [*frozen.names(args.pair_indices), *(["labels"] if args.alpha < 1 else [])]
        by_labels = targets is not None and args.num_pairs == 1
        self._needed_in_evaluation = ["pixel_values", "labels"] if by_labels else self._needed
        stitched = StitchedStudent(
            model,
            [student_stages[i] for i in args.pair_indices],
            vision_config(around.config).hidden_size,
            args.stitch if args.num_pairs > 1 else "none",
            seed=args.seed,
            nac_codes=args.nac_codes,
            read_in_latents=args.read_in_latents,
            special_tokens=num_special_tokens(around.config) if args.num_pairs > 1 or meta is not None else None,
            feed=args.feed,
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
        self.frozen = frozen.to(args.device, compute_dtype(args))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, as [`~transformers.Trainer.train`]; with `stitch_init="least_squares"` fit the stitches first."""
        if self.args.stitch_init == "least_squares" and self.args.num_pairs > 1 and not resume_from_checkpoint:
            stitched = self.accelerator.unwrap_model(self.model)
            fit_stitches(stitched, self.frozen, self._some_batches())
        return super().train(resume_from_checkpoint, **kwargs)

    def _some_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of up to `FITTED_IMAGES` training images, spread evenly over the set, the same in every process."""
        dataset, size = self.train_dataset, self.args.per_device_eval_batch_size
        if isinstance(dataset, IterableDataset):
            samples = list(islice(iter(dataset), FITTED_IMAGES))
        else:
            chosen = np.linspace(0, len(dataset) - 1, min(FITTED_IMAGES, len(dataset))).round().astype(int)
            samples = [dataset[int(index)] for index in chosen]
        for start in range(0, len(samples), size):
            yield self._prepare_inputs(self.data_collator(samples[start : start + size]))

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
        check_batch(inputs, self._needed if model.training else self._needed_in_evaluation)
        labels = inputs.get("labels")
        pair_inputs, targets = self.frozen.inputs_and_targets(inputs, self.args.pair_indices)
        outputs = model(pair_inputs, seed=self._next_seed() if model.training else None)
        outputs = {int(name): output for name, output in outputs.items()}

        losses, statistics, all_logits = [], [], []
        for index, (hidden_states, balance) in outputs.items():
            output, target = self.frozen.matched(hidden_states, index), targets.get(index)
            if self._has_logits(index):
                all_logits.append(output.detach())
                losses.append(self._pair_loss(output, target, labels))
                statistics.append(_statistics_of(output.detach(), target, labels, self.args.temperature))
            else:
                target = pool_tokens(target, output.shape[1])
                losses.append(boundary_loss(output, target))
                statistics.append(_boundary_statistics(output.detach(), target))
            losses[-1] = losses[-1] + balance.get("aux_loss", 0.0)
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
        return loss, (torch.cat(statistics, dim=1), self._logits(inputs, all_logits))

    def _has_logits(self, index: int) -> bool:
        """Whether a pair is compared by logits, and not by hidden states."""
        return self.args.match == "logits" or index == self.args.num_pairs - 1

    def _logits(self, inputs: dict[str, Any], logits: list[torch.Tensor]) -> torch.Tensor | None:
        """The logits for `compute_metrics`, from those of the pairs that have some."""
        is_cut = self.args.num_pairs > 1 and self.args.match == "logits"
        return torch.stack(logits, dim=1) if is_cut else logits[-1] if logits else None

    def _pair_loss(
        self, logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        alpha = self.args.alpha
        loss = 0.0
        if labels is not None:
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
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        # once for all pairs: the loss scaler of fp16 refuses to do it twice
        self.accelerator.unscale_gradients()
        pairs = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).pairs
        norms = [nn.utils.clip_grad_norm_(list(pair.parameters()), self.args.max_grad_norm) for pair in pairs.values()]
        return torch.linalg.vector_norm(torch.stack([whole_tensor(norm) for norm in norms]))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # with a loss scaler (fp16) a gradient that overflows is expected: the step is skipped and the scale lowered
        if self.accelerator.scaler is None and grad_norm is not None:
            grad_norm = whole_tensor(torch.as_tensor(grad_norm, device=self.args.device))
            self._stop_unless_finite(grad_norm.reshape(1), "gradient norm")
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
        self._collect_weights()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.stitched.parameters()):
            return "The weights are not finite either, so they were not saved; earlier checkpoints are untouched."
        self._save_checkpoint(self.model, trial=None)
        return f"The last good state is {Path(self.args.output_dir) / f'checkpoint-{self.state.global_step}'}."


def _network_hashes(
    args: M2MKDConfig, teacher: PreTrainedModel | None, meta: PreTrainedModel | None, targets: TargetCache | None
) -> dict[str, str | None]:
    """What the contracts of the pairs identify the networks by; a whole student has no contract."""
    if args.num_pairs == 1:
        return {}
    if targets is not None:
        return {"teacher_sha256": targets.teacher_sha256}
    used = {"teacher": teacher if args.uses_teacher else None, "meta": meta}
    return {f"{name}_sha256": tensors_sha256(own.state_dict()) for name, own in used.items() if own is not None}


def _frozen_networks(
    args: M2MKDConfig, teacher: PreTrainedModel | None, meta: PreTrainedModel | None, is_cached: bool
) -> FrozenNetworks:
    """The networks around the pairs of this process, or what takes their place."""
    if is_cached:
        return CachedTargets(args.num_pairs, is_chained=args.feed == "student")
    stages: list[Stage] = []
    if teacher is not None and args.uses_teacher:
        stages = split_into_stages(teacher, args.teacher_depths or [count_layers(teacher)])
    if args.num_pairs > 1 and args.context == "teacher":
        return TeacherContext(stages, args.pair_indices, args.match)
    meta_stages = split_into_stages(meta, args.meta_depths or [1] * args.num_pairs) if meta is not None else []
    match = args.match if args.num_pairs > 1 else "logits"
    return FrozenNetworks(meta_stages, {index: stages[index] for index in args.pair_indices if stages}, match)


def compute_dtype(args: M2MKDConfig) -> torch.dtype:
    """The dtype that frozen networks compute in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _statistics_of(
    logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Statistics of shape `(batch_size, len(STATISTICS))`; those that need labels or a teacher are NaN without."""
    prediction = logits.argmax(dim=-1)
    cross_entropy = accuracy = kl = agreement = torch.full(prediction.shape, math.nan, device=logits.device)
    unknown = cross_entropy
    if labels is not None:
        target = labels if labels.ndim == 1 else labels.argmax(dim=-1)
        cross_entropy, accuracy = per_sample_cross_entropy(logits, labels), (prediction == target).float()
    if teacher_logits is not None:
        kl = per_sample_kl(logits, teacher_logits, temperature)
        agreement = (prediction == teacher_logits.argmax(dim=-1)).float()
    return torch.stack([cross_entropy, accuracy, kl, agreement, unknown], dim=1)


def _boundary_statistics(hidden_states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Statistics of a pair without logits, of shape `(batch_size, len(STATISTICS))`."""
    errors = per_sample_boundary_error(hidden_states, target)
    return torch.stack([*[torch.full_like(errors, math.nan)] * (len(STATISTICS) - 1), errors], dim=1)
