"""Prediction of whole data sets."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import patch_environment
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from m2mkd.data.metrics import PerClassAccuracy, accuracies
from m2mkd.distillation.losses import per_sample_cross_entropy


@dataclass(frozen=True)
class Predictions:
    """
    Predictions of a model for a data set of `n` images.

    Attributes:
        ranked: The classes ranked best, best first, int64 `(n, k)` with `k <= 5`; -1 where a logit is not a number.
        losses: Cross entropy of each image, float32 `(n,)`.
        labels: int64 `(n,)`.
        classes: Number of classes that could be predicted.
    """

    ranked: np.ndarray
    losses: np.ndarray
    labels: np.ndarray
    classes: int

    def summary(self) -> dict[str, float]:
        """`accuracy` and `top5_accuracy` in [0, 1] (of all classes, if there are fewer than 5), `loss`, and `n`."""
        loss = float(self.losses.mean(dtype=np.float64))
        return {**accuracies(self.ranked, self.labels), "loss": loss, "n": len(self.labels)}

    def per_class(self, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """`accuracy` in [0, 1] and number of images `n` of each class that has images, by name."""
        result = PerClassAccuracy().compute(
            predictions=self.ranked[:, 0], references=self.labels, num_classes=len(class_names)
        )
        rows = zip(class_names, result["accuracy"], result["n"], strict=True)
        return {name: {"accuracy": accuracy, "n": n} for name, accuracy, n in rows if n}


def predict(model: PreTrainedModel, dataset: Dataset, batch_size: int, use_cpu: bool) -> Predictions:
    """
    Predict a whole data set, each image counted once, in one process or several.

    Where the set's own label space is a part of the model's (`LabeledImages.possible`), the logits of all other
    classes are left out, as the official code does for ImageNet-R and Tiny-ImageNet-R.

    Args:
        model (`PreTrainedModel`): A classifier.
        dataset (`Dataset`): Gives `pixel_values` and `labels`.
        batch_size (`int`): Images per device.
        use_cpu (`bool`): Whether to stay on the CPU.
    """
    possible = getattr(dataset, "possible", None)
    classes = model.config.num_labels if possible is None else len(possible)

    def keep(outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # ranks and losses instead of logits: the logits of 50,000 images and 1,000 classes would fill 200 MB
        logits = among(outputs[0] if isinstance(outputs, tuple) else outputs, possible)
        ranked = logits.sort(dim=-1, descending=True, stable=True).indices[:, : min(5, classes)]
        ranked = ranked.masked_fill(logits.isnan().any(dim=-1, keepdim=True), -1)
        return ranked, per_sample_cross_entropy(logits, labels)

    output = run_over(model, dataset, batch_size, use_cpu, keep)
    ranked, losses = output.predictions
    return Predictions(ranked, losses, np.asarray(output.label_ids), classes)


def among(logits: torch.Tensor, possible: np.ndarray | None) -> torch.Tensor:
    """The logits in float32, and -inf for all classes but the `possible` ones (`None`: all are)."""
    logits = logits.float()
    if possible is None:
        return logits
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[torch.from_numpy(possible).to(logits.device)] = True
    return logits.masked_fill(~allowed, -torch.inf)


def run_over(
    model: nn.Module, dataset: Dataset, batch_size: int, use_cpu: bool, keep: Callable[..., Any] | None = None
) -> PredictionOutput:
    """
    What a model gives for each image of a data set, in one process or several.

    Args:
        model (`nn.Module`): Takes `pixel_values` and `labels`; gives the loss, and what is gathered.
        dataset (`Dataset`), batch_size (`int`), use_cpu (`bool`): See [`predict`].
        keep (`Callable`, *optional*): Called with what the model gives and the labels; makes of it what is gathered.
    """
    # each process has the whole model: shards (FSDP, DeepSpeed) are for training
    whole = patch_environment(accelerate_use_fsdp="false", accelerate_use_deepspeed="false")
    with tempfile.TemporaryDirectory() as folder, whole:
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            use_cpu=use_cpu,
            dataloader_pin_memory=not use_cpu,
            report_to="none",
            disable_tqdm=True,
            # a module that is not a model of transformers does not say what it takes
            remove_unused_columns=False,
            label_names=["labels"],
        )
        trainer = Trainer(model, args=args, preprocess_logits_for_metrics=keep)
        trainer.remove_callback(PrinterCallback)
        return trainer.predict(dataset)


def evaluate_model(model: PreTrainedModel, dataset: Dataset, batch_size: int, use_cpu: bool) -> dict[str, float]:
    """
    Measure accuracy, top-5 accuracy and mean cross entropy over a whole data set; see [`predict`].

    Returns:
        `accuracy` and `top5_accuracy` in [0, 1], `loss`, and the number of images `n`.
    """
    return predict(model, dataset, batch_size, use_cpu).summary()
