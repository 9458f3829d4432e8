"""How evenly a model uses its experts."""

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel


@torch.no_grad()
def expert_load(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> dict[str, list[float]] | None:
    """
    Fraction of the tokens' choices that each expert gets.

    Returns:
        `num_experts` fractions that sum to 1, by layer index; `None` for a model without experts.
    """
    sparse_layers = getattr(model.config, "moe_layers", None)
    if not sparse_layers:
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
    return {str(layer): (count / count.sum()).tolist() for layer, count in zip(sparse_layers, counts, strict=True)}
