"""A new linear head on frozen features, fitted to all labels: a linear probe."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from m2mkd.data.dataset import ImageDataset
from m2mkd.data.splits import holdout_indices
from m2mkd.distillation.split import stage_class
from m2mkd.evaluation.few_shot import classifier_inputs
from m2mkd.screen import Screen


# Weight decays that are tried, and the fraction of the training images that decides between them.
WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)
HELD_OUT = 0.2
_ITERATIONS = 200


@dataclass(frozen=True)
class Probe:
    """
    How a head was fitted.

    Args:
        weight_decay (`float`): Factor of the squared weights on standardized features, chosen on held-out images.
        held_out_accuracy (`float`): Accuracy there, before the fit to all images.
        flops (`float`): Of all fits, without the features.
    """

    weight_decay: float
    held_out_accuracy: float
    flops: float


def fit_probe(model: PreTrainedModel, dataset: ImageDataset, batch_size: int, screen: Screen) -> Probe:
    """
    Fit the head of a classifier in place by multinomial logistic regression with L-BFGS on frozen features (the linear
    probe of CLIP, arXiv 2103.00020, appendix A.3; the weight decay is swept as there). Of two heads whose logits are
    averaged, each gets its part.

    Args:
        model (`PreTrainedModel`): A classifier with a new head for the classes of the data.
        dataset (`ImageDataset`): Images without augmentation.
        batch_size (`int`): Images per pass.
        screen (`Screen`): Shows the progress.

    Raises:
        `DataError`: a class has fewer than two images.
    """
    labels = dataset.data.labels
    positions = np.arange(len(dataset))
    found = classifier_inputs(model.eval(), dataset, [positions], batch_size, screen)
    features = torch.stack([found[int(position)] for position in positions]).double()
    train, test = (torch.from_numpy(part) for part in holdout_indices(labels, dataset.data.class_names, HELD_OUT))
    targets, scores, flops = torch.from_numpy(labels), {}, 0.0
    for decay in WEIGHT_DECAYS:
        weight, bias, spent = _fit(features[train], targets[train], model.config.num_labels, decay)
        scores[decay] = (F.linear(features[test], weight, bias).argmax(dim=1) == targets[test]).double().mean().item()
        flops += spent
    best = max(scores, key=lambda decay: (scores[decay], decay))
    weight, bias, spent = _fit(features, targets, model.config.num_labels, best)
    _set_heads(stage_class(type(model)).classifiers_of(model), weight, bias)
    return Probe(best, scores[best], flops + spent)


def _fit(
    features: torch.Tensor, labels: torch.Tensor, num_labels: int, weight_decay: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Weight and bias of the head for features as they are, and the FLOPs of the fit."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(num_labels, features.shape[1], dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(num_labels, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")
    passes = 0

    def closure() -> torch.Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        scaled = weight / std
        # forward, and backward to the weights
        return scaled, bias - scaled @ mean, passes * 4.0 * inputs.numel() * num_labels


@torch.no_grad()
def _set_heads(heads: list[nn.Linear], weight: torch.Tensor, bias: torch.Tensor) -> None:
    for head, part in zip(heads, weight.split([head.in_features for head in heads], dim=1), strict=True):
        head.weight.copy_(part * len(heads))
        head.bias.copy_(bias)
