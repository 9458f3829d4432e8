"""Stitches that start as the least-squares maps from student features to the teacher's hidden states."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from m2mkd.distillation.frozen_networks import FrozenNetworks
from m2mkd.distillation.losses import pool_tokens
from m2mkd.distillation.stitched_student import StitchedStudent


# Number of training images that the maps are fitted on.
FITTED_IMAGES = 256
# Ridge of the fit, relative to the mean square of the features, which can be linearly dependent.
_RIDGE = 1e-6


@torch.no_grad()
def fit_stitches(
    student: StitchedStudent, frozen: FrozenNetworks, batches: Iterable[Mapping[str, torch.Tensor]]
) -> None:
    """
    Replace the linear maps behind the stages, in place, by those that map the outputs of the untrained stages to the
    outputs of the teacher's stages with the smallest squared error (in closed form; SN-Net, arXiv 2302.06586, starts
    its stitches this way). The stitches before the stages are not changed.

    Args:
        student (`StitchedStudent`): On the device of `frozen`.
        frozen (`FrozenNetworks`): With a teacher stage for each pair.
        batches (`Iterable[dict[str, torch.Tensor]]`): What `frozen` takes, on its device.
    """
    indices = [int(name) for name in student.pairs]
    stitched = {index: pair for index, pair in zip(indices, student.pairs.values(), strict=True) if pair.has_post}
    squares, products = dict.fromkeys(stitched, 0.0), dict.fromkeys(stitched, 0.0)
    was_training = student.training
    student.eval()
    for batch in batches:
        inputs, targets = frozen.boundaries(batch, indices)
        outputs = student.run({index: states.float() for index, states in inputs.items()})
        for index, pair in stitched.items():
            features = pair.post.layernorm(outputs[index][0]).double()
            target = pool_tokens(pair.with_own_tokens(targets[index]), features.shape[1]).double()
            features = nn.functional.pad(features.flatten(end_dim=1), (0, 1), value=1.0)
            squares[index] = squares[index] + features.T @ features
            products[index] = products[index] + features.T @ target.flatten(end_dim=1)
    student.train(was_training)
    for index, pair in stitched.items():
        square = squares[index]
        ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
        solution = torch.linalg.solve(square + ridge, products[index])
        pair.post.linear.weight.copy_(solution[:-1].T)
        pair.post.linear.bias.copy_(solution[-1])
