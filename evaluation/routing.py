"""Which expert of a V-MoE sees which patch, with which weight, and how far the experts specialise on classes."""

import sys

import torch
from torch.utils.data import DataLoader

from m2mkd.data.dataset import ImageDataset
from m2mkd.errors import StageError
from m2mkd.evaluation.overlay import weights_of_patches
from m2mkd.modeling.modeling_vmoe import VMoEForImageClassification
from m2mkd.screen import Screen


def patch_weights(model: VMoEForImageClassification, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
    """
    Compute the weight with which each expert's output counts for each patch. The model has to be in evaluation mode.

    Args:
        model (`VMoEForImageClassification`)
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`)

    Returns:
        By index of the sparse layer, of shape `(batch_size, num_patches, num_experts)`. It is 0 where the expert does
        not see the patch, or has no room for it. An ensemble gives `batch_size * num_ensemble_members` rows, the
        members of an image one after the other.

    Raises:
        `StageError`: the model does not take images of this size, or groups of tokens of this number.
    """
    try:
        return weights_of_patches(model, pixel_values)
    except ValueError as error:
        raise StageError(f"The model cannot route these images: {error}") from error


def specialisation(
    model: VMoEForImageClassification, dataset: ImageDataset, batch_size: int
) -> dict[int, torch.Tensor]:
    """
    Compute the fraction of a class's patches that each expert sees. For soft routing, where every expert sees all, it
    is the mean weight.

    Args:
        model (`VMoEForImageClassification`): In evaluation mode.
        dataset (`ImageDataset`)
        batch_size (`int`)

    Returns:
        By index of the sparse layer, of shape `(num_classes, num_experts)`. A row sums to the number of experts of a
        token, less what is dropped. It is NaN for a class without images.
    """
    num_classes, is_soft = len(dataset.data.class_names), model.config.router_type == "soft"
    counts = torch.zeros(num_classes)
    sums: dict[int, torch.Tensor] = {}
    batches = DataLoader(dataset, batch_size=batch_size)
    for batch in Screen(sys.stderr).track(f"routing of {len(dataset):,} images", batches, len(batches)):
        labels = batch["labels"].repeat_interleave(model.config.num_ensemble_members)
        counts += labels.bincount(minlength=num_classes)
        for layer, weights in patch_weights(model, batch["pixel_values"].to(model.device)).items():
            seen = weights if is_soft else (weights > 0).float()
            sums.setdefault(layer, torch.zeros(num_classes, weights.shape[-1])).index_add_(0, labels, seen.mean(dim=1))
    return {layer: total / counts[:, None] for layer, total in sums.items()}
