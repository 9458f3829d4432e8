"""Trains the pairs of m2mKD: one prefix pass, the teacher's stages, stitched student stages, frozen suffixes."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from m2mkd.data.dataset import ImageDataset
from m2mkd.data.errors import DataError
from m2mkd.data.sampling import RepeatedSampler
from m2mkd.modeling.frozen_networks import FrozenNetworks
from m2mkd.modeling.losses import (
    hard_distillation_loss,
    per_sample_cross_entropy,
    per_sample_kl,
    soft_distillation_loss,
)
from m2mkd.modeling.pair_files import save_pair, tensors_sha256
from m2mkd.modeling.stages import StageError, check_stitchable, count_layers, num_special_tokens, split_into_stages
from m2mkd.modeling.stitched_student import StitchedStudent
from m2mkd.trainer.m2mkd_config import M2MKDConfig


logger = logging.get_logger(__name__)
# What one image tells of one pair; means of these are logged and evaluated.
STATISTICS = ("cross_entropy", "accuracy", "kl", "agreement")
# Written into a checkpoint when all its other files are there; a process can die between two of them.
COMPLETE_MARKER = "COMPLETE"


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; training stopped before the weights took it."""


class M2MKDTrainer(Trainer):
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
            The student, an ordinary classifier that `split_into_stages` can cut, as the other networks are. Only the
            stages of `args.pairs` are touched and moved to the device; the others may be on the meta device.
        args ([`M2MKDConfig`])
        teacher (`PreTrainedModel`, *optional*): Required if `args.alpha > 0`. It is frozen and, under mixed precision,
            cast to the compute dtype, in place; only the stages in use are kept.
        meta (`PreTrainedModel`, *optional*): Required if the student is cut into more than one stage. Frozen as the
            teacher is.
        data_collator, train_dataset, eval_dataset, processing_class, callbacks, optimizers: As in
            [`~transformers.Trainer`]. Data sets give `pixel_values` of shape `(num_channels, height, width)` and
            `labels`, a class index or a distribution over the classes.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): As in [`~transformers.Trainer`]; the
            trainer's own statistics stay beside it. `predictions` are the logits: of shape `(n, num_labels)` for a
            whole student, `(n, num_pairs, num_labels)` for pairs, which are in the order of `args.pairs`.

    Raises:
        `StageError`: the networks cannot be stitched (architectures, widths, token counts, label spaces, missing
            networks).
        `DataError`: a batch has no `pixel_values` or `labels`.
        `TypeError`: `args` are not an `M2MKDConfig`.
        `NonFiniteError`: a loss or gradient is not finite; the last good state is saved first.
    """

    # compute_loss returns the mean over the batch, so the Trainer divides by the accumulation steps
    loss_is_scaled_for_ga = False
    _statistic_names: tuple[str, ...] = STATISTICS
    _tag_names = ["m2mkd", "image-classification", "knowledge-distillation"]

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
        _check_networks(args, model, teacher, meta)
        indices = args.pair_indices
        student_stages = split_into_stages(model, args.student_depths or [count_layers(model)])
        stitch_size = (meta or teacher or model).config.hidden_size
        stitch = args.stitch if args.num_pairs > 1 else "none"
        if stitch == "none" and meta is not None and model.config.hidden_size != stitch_size:
            raise StageError(
                f"`stitch` is 'none', but the student is {model.config.hidden_size} wide and the meta model "
                f"{stitch_size}. Choose 'layernorm_linear' or 'linear'."
            )
        meta_stages = split_into_stages(meta, args.meta_depths or [1] * args.num_pairs) if meta is not None else []
        teacher_stages = {}
        if teacher is not None and args.alpha > 0:
            cut = split_into_stages(teacher, args.teacher_depths or [count_layers(teacher)])
            teacher_stages = {index: cut[index] for index in indices}

        # before anything is cast; contracts of pairs name the networks by them
        used = {"teacher": teacher if args.alpha > 0 else None, "meta": meta} if args.num_pairs > 1 else {}
        self.network_hashes = {
            f"{name}_sha256": tensors_sha256(network.state_dict())
            for name, network in used.items()
            if network is not None
        }
        self.student = model
        self.stitch_size = stitch_size
        self._given_metrics = compute_metrics
        self._statistics: dict[str, torch.Tensor] = defaultdict(float)
        self._num_batches = 0
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
            compute_metrics=self._metrics,
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
        Sum of the pairs' losses: their gradients do not mix, so each pair is trained as if it were alone.

        Returns:
            The loss of shape `()`; with `return_outputs` also the statistics of each image and pair, of shape
            `(batch_size, num_pairs * len(STATISTICS))`, and the logits, as `compute_metrics` is given them.
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
        """Seed of this micro batch's random numbers, equal in a resumed run; `None` if none are drawn."""
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
        Statistics of each image take the place of predictions, so that means over the whole set are exact; with
        `compute_metrics` the logits follow them.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, (statistics, logits) = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        predictions = statistics.float() if self._given_metrics is None else (statistics.float(), logits.float())
        return loss, predictions, inputs.get("labels")

    def _metrics(self, found: EvalPrediction) -> dict[str, float]:
        """Mean statistics, and what the metrics that the trainer was given make of the logits."""
        if self._given_metrics is None:
            return self._mean_statistics(found.predictions)
        statistics, logits = found.predictions
        given = self._given_metrics(EvalPrediction(predictions=logits, label_ids=found.label_ids))
        return {**self._mean_statistics(statistics), **given}

    def _mean_statistics(self, statistics: np.ndarray) -> dict[str, float]:
        means = statistics.mean(axis=0).reshape(-1, len(self._statistic_names))
        return {
            self._metric_name(index, name): float(value)
            for index, values in zip(self.args.pair_indices, means, strict=True)
            for name, value in zip(self._statistic_names, values, strict=True)
            if not math.isnan(value)
        }

    # ---- Logs ----

    def _metric_name(self, index: int, name: str) -> str:
        return f"pair_{index}_{name}" if self.args.num_pairs > 1 else name

    def _add_statistic(self, index: int, name: str, value: torch.Tensor) -> None:
        self._statistics[self._metric_name(index, name)] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pairs' mean statistics since the last log to the Trainer's own entries."""
        if self._num_batches and "loss" in logs:
            names = list(self._statistics)
            means = torch.stack([self._statistics[name] for name in names]) / self._num_batches
            means = self.accelerator.reduce(means.float(), reduction="mean").tolist()
            # `loss` itself is the Trainer's: the sum over the pairs
            logs = {**{n: v for n, v in zip(names, means, strict=True) if not math.isnan(v)}, **logs}
            self._statistics.clear()
            self._num_batches = 0
        super().log(logs, start_time)

    # ---- Steps ----

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip each pair by its own norm, as if it were trained alone. Returns the norm of all before clipping."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        # once for all pairs: the loss scaler of fp16 refuses a second time
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

    # ---- Saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE_MARKER).touch()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the student: a whole student as an ordinary Hugging Face folder; of a cut one each trained pair, stitches
        included, in `<output_dir>/pairs/<index>`. With `push_to_hub` it is pushed, too.
        """
        if _internal_call and output_dir is not None:
            # a checkpoint: what training goes on from
            super().save_model(output_dir, _internal_call=True)
            return
        if self.args.should_save:
            self._save_student(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_student(self, folder: Path) -> None:
        processors = [self.processing_class] if self.processing_class is not None else []
        if self.args.num_pairs == 1 or self.args.pairs == "all":
            self.student.save_pretrained(folder)
            for processor in processors:
                processor.save_pretrained(folder)
        if self.args.num_pairs > 1:
            for index, pair in self.trained_pairs().items():
                save_pair(pair, folder / "pairs" / str(index), self.stitch_size, **self.network_hashes)
                for processor in processors:
                    processor.save_pretrained(folder / "pairs" / str(index))

    # ---- The Hub ----

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.push_to_hub`]; what goes there is what [`~M2MKDTrainer.save_model`] writes."""
        # a push on its way still reads the files that are written next
        self._finish_current_push()
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the Trainer would take the weights of the checkpoint, which are the stitched stages' and not the student's
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save_student(Path(self.args.output_dir))
        self.create_model_card()
        step = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(self.args.output_dir, step, ignore_patterns=["_*", "checkpoint-*"])]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"{step}, checkpoint", path_in_repo=place))
        self.push_in_progress = PushInProgress(jobs)

    def _upload(self, folder: str, message: str, **kwargs: Any) -> Future:
        job = HfApi(library_name="m2mkd").upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
            **kwargs,
        )
        job.add_done_callback(_say_failure)
        return job

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write `README.md` into `args.output_dir`. Of the arguments that [`~transformers.Trainer`] takes, `license`,
        `tags` and `dataset_tags` (Hub ids of the training data) are told.
        """
        # here, since it imports the folders of a run, which import this module
        from m2mkd.trainer.cards import CARD_FILE, render_trainer_card

        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        card = render_trainer_card(
            self.student.config,
            self.args,
            source=self.hub_model_id or self.args.output_dir,
            parameters=self.student.num_parameters(),
            metrics=evaluations[-1] if evaluations else {},
            license=license,
            tags=[*self._tag_names, *_as_list(tags)],
            datasets=_as_list(dataset_tags) or None,
        )
        card.save(Path(self.args.output_dir) / CARD_FILE)

    def trained_pairs(self) -> dict[int, nn.Module]:
        """The stitched stages that this trainer trains, by pair index."""
        pairs = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).pairs
        return {int(name): pair for name, pair in pairs.items()}


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _say_failure(job: Future) -> None:
    # nobody asks a push in the background for its result
    if not job.cancelled() and job.exception() is not None:
        logger.warning(f"A push to the Hub failed, training goes on: {job.exception()}")


def check_arguments(args: Any, *networks: PreTrainedModel | None) -> None:
    """
    Check what a trainer of stages is given, before anything else reads it.

    Raises:
        `TypeError`: `args` are not an `M2MKDConfig`.
        `StageError`: a network that cannot be cut into stages.
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
            "of the data set must have `pixel_values`, of shape (num_channels, height, width), and `labels`: prepare "
            "it with the image processor, e.g. by `with_transform` of `datasets`, or give a `data_collator`."
        )


def _check_networks(
    args: M2MKDConfig, student: PreTrainedModel, teacher: PreTrainedModel | None, meta: PreTrainedModel | None
) -> None:
    if args.alpha > 0 and teacher is None:
        raise StageError(f"`alpha` is {args.alpha}, but there is no teacher. Give one, or set `alpha=0`.")
    if args.num_pairs > 1 and meta is None:
        raise StageError(
            f"`student_depths` {args.student_depths} makes {args.num_pairs} pairs, but there is no meta model to put "
            "around them. Give `meta`, or leave `student_depths` out to train the student as a whole."
        )
    check_stitchable(student.config, teacher.config if teacher is not None else None, meta.config if meta else None)


def _compute_dtype(args: M2MKDConfig) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _statistics_of(
    logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`(batch_size, len(STATISTICS))`; what needs a teacher is NaN without one."""
    prediction = logits.argmax(dim=-1)
    target = labels if labels.ndim == 1 else labels.argmax(dim=-1)
    cross_entropy = per_sample_cross_entropy(logits, labels)
    unknown = torch.full_like(cross_entropy, math.nan)
    kl = unknown if teacher_logits is None else per_sample_kl(logits, teacher_logits, temperature)
    agreement = unknown if teacher_logits is None else (prediction == teacher_logits.argmax(dim=-1)).float()
    return torch.stack([cross_entropy, (prediction == target).float(), kl, agreement], dim=1)
