"""How evenly a model uses its experts."""

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from m2mkd.modeling.vmoe_routers import VMoERouter


@torch.no_grad()
def expert_load(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> dict[str, list[float]] | None:
    """
    Fraction of the tokens' choices that each expert gets. A choice counts also if the expert has no room for it.

    Returns:
        `num_experts` fractions that sum to 1, by layer index; `None` for a model without experts.
    """
    routers = [module for module in model.modules() if isinstance(module, VMoERouter)]
    if not routers:
        return None
    counts = {router: torch.zeros(router.num_experts, dtype=torch.long) for router in routers}

    def count(router: VMoERouter, _inputs: tuple, choice: tuple) -> None:
        counts[router] += router.load(choice).cpu()

    hooks = [router.register_forward_hook(count) for router in routers]
    model.eval()
    try:
        for batch in DataLoader(dataset, batch_size=batch_size):
            model(batch["pixel_values"].to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    layers = zip(sorted(model.config.moe_layers), counts.values(), strict=True)
    return {str(layer): (load / load.sum()).tolist() for layer, load in layers}
