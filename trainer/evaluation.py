"""Evaluates whole models on the test sets of a recipe."""

import tempfile
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.data.metrics import compute_metrics


def evaluate_model(model: PreTrainedModel, dataset: Dataset, batch_size: int, use_cpu: bool) -> dict[str, float]:
    """
    Accuracy, top-5 accuracy and mean cross entropy over a whole data set, each image counted once.

    Args:
        model (`PreTrainedModel`): A classifier.
        dataset (`Dataset`): Gives `pixel_values` and `labels`.
        batch_size (`int`): Images a device.
        use_cpu (`bool`): Stay on the CPU.

    Returns:
        `accuracy` and `top5_accuracy` in [0, 1], `loss`, and the number of images `n`.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            use_cpu=use_cpu,
            dataloader_pin_memory=not use_cpu,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, args=args, compute_metrics=compute_metrics)
        trainer.remove_callback(PrinterCallback)
        metrics = trainer.evaluate(dataset)
    names = ("accuracy", "top5_accuracy", "loss")
    return {**{name: metrics[f"eval_{name}"] for name in names}, "n": len(dataset)}


@torch.no_grad()
def expert_load(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> dict[str, list[float]] | None:
    """
    Share of the tokens' choices that falls on each expert.

    Returns:
        By layer index, `num_experts` shares that sum to 1; `None` for a model without experts.
    """
    if not isinstance(model.config, VMoEConfig) or not model.config.moe_layers:
        return None
    counts: list[torch.Tensor] = []
    model.eval()
    for batch in DataLoader(dataset, batch_size=batch_size):
        outputs: Any = model(batch["pixel_values"].to(model.device), output_router_logits=True)
        for position, logits in enumerate(outputs.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten()
            new = torch.bincount(chosen, minlength=model.config.num_experts).cpu()
            if position == len(counts):
                counts.append(torch.zeros_like(new))
            counts[position] += new
    return {
        str(layer): (count / count.sum()).tolist()
        for layer, count in zip(model.config.moe_layers, counts, strict=True)
    }
