"""How evenly a model uses its experts."""

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from m2mkd.modeling.vmoe_routers import VMoERouter


@torch.no_grad()
def expert_use(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> dict[str, Any]:
    """
    Measure how a model uses its experts.

    Returns:
        `expert_load`: `num_experts` fractions that sum to 1, by layer index: those of the tokens' choices that each
        expert gets, also if it has no room for them; `None` for a model without experts. `dropped`: see
        [`~m2mkd.modeling.vmoe_outputs.VMoEImageClassifierOutput`]; `None` for a model without a capacity.
    """
    routers = [module for module in model.modules() if isinstance(module, VMoERouter)]
    if not routers:
        return {"expert_load": None, "dropped": None}
    dropped = 0.0
    counts = {router: torch.zeros(router.num_experts, dtype=torch.long) for router in routers}

    def count(router: VMoERouter, _inputs: tuple, choice: tuple) -> None:
        counts[router] += router.load(choice).cpu()

    hooks = [router.register_forward_hook(count) for router in routers]
    model.eval()
    try:
        for batch in DataLoader(dataset, batch_size=batch_size):
            output = model(batch["pixel_values"].to(model.device))
            if output.dropped is not None:
                dropped += output.dropped.item() * len(batch["pixel_values"]) / len(dataset)
    finally:
        for hook in hooks:
            hook.remove()
    layers = zip(sorted(model.config.moe_layers), counts.values(), strict=True)
    return {
        "expert_load": {str(layer): (load / load.sum()).tolist() for layer, load in layers},
        "dropped": dropped if model.config.has_capacity else None,
    }
